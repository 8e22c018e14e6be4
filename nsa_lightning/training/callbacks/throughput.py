"""Tokens a second and model FLOPs utilisation."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor
from nsa_kernels.errors import SettingError

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.training.strategy import ranks_a_batch


class TokenThroughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor told what a token is: `items_per_sec` counts tokens.

    MFU is logged on devices whose peak Lightning or `PEAK_FLOPS` knows, from the FLOPs of the documents' real lengths.

    Args:
        window_size: batches over which the rates are averaged.
    """

    def __init__(self, window_size: int = 20) -> None:
        if window_size < 2:
            raise SettingError(f"throughput.window_size must be at least 2, got {window_size}")
        self._known_peak: int | None = None
        self._lightnings_peak: int | None = None
        super().__init__(batch_size_fn=_num_batches, length_fn=self._num_tokens, window_size=window_size)
        self._ranks_a_batch = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out how many ranks share a batch, and the device's peak."""
        self._ranks_a_batch = ranks_a_batch(trainer)
        if trainer.strategy.root_device.type == "cuda":
            name = torch.cuda.get_device_name(trainer.strategy.root_device)
            self._known_peak = peak_flops(name, str(trainer.precision))
        super().setup(trainer, pl_module, stage)

    @property
    def available_flops(self) -> int | None:
        """FLOP/s of the device at most; where Lightning does not know them, those of PEAK_FLOPS."""
        return self._known_peak if self._lightnings_peak is None else self._lightnings_peak

    @available_flops.setter
    def available_flops(self, flops: int | None) -> None:
        self._lightnings_peak = flops

    def _num_tokens(self, batch: PackedBatch) -> int:
        return len(batch.tokens) // self._ranks_a_batch


PEAK_FLOPS = {"H200": 989_400_000_000_000, "B200": 2_250_000_000_000_000}
"""Dense bf16 and fp16 FLOP/s of GPUs that Lightning does not know by their names, from NVIDIA's data sheets."""


def peak_flops(device_name: str, precision: str) -> int | None:
    """FLOP/s that a GPU of this name has at most in the trainer's precision; None where that is not known."""
    known = (peak for chip, peak in PEAK_FLOPS.items() if chip in device_name.split())
    return next(known, None) if precision.startswith(("bf16", "16")) else None


def _num_batches(batch: PackedBatch) -> int:
    return 1
