"""Tokens a second and model FLOPs utilisation."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ThroughputMonitor

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.training.strategy import ranks_a_batch


class TokenThroughput(ThroughputMonitor):
    """Lightning's ThroughputMonitor told what a token is: `items_per_sec` counts tokens.

    MFU is logged on devices whose peak Lightning knows, from the FLOPs of the documents' real lengths.

    Args:
        window_size: batches over which the rates are averaged.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(batch_size_fn=_num_batches, length_fn=self._num_tokens, window_size=window_size)
        self._ranks_a_batch = 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out how many ranks share a batch."""
        super().setup(trainer, pl_module, stage)
        self._ranks_a_batch = ranks_a_batch(trainer)

    def _num_tokens(self, batch: PackedBatch) -> int:
        return len(batch.tokens) // self._ranks_a_batch


def _num_batches(batch: PackedBatch) -> int:
    return 1
