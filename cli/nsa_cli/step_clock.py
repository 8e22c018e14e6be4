"""The callback that measures a case of `nsa bench training`."""

import json
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from nsa_lightning.benchmark.results import environment, write_whole
from nsa_lightning.benchmark.training_step import StepMeasurement, StepSettings, StepTimer
from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.training.callbacks import TokenThroughput
from nsa_lightning.training.compat import accumulates
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.strategy import ranks_a_batch


class StepClock(Callback):
    """Times the steps after warm-up and writes what was measured."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        self._timer = StepTimer(settings)
        self._tokens = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """Mark the end of a step of the optimizer."""
        if not accumulates(trainer):
            self._tokens = len(batch.tokens)
            self._timer.end_step(trainer.global_step, trainer.strategy.root_device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the other ranks for their peak, and write the result."""
        assert isinstance(pl_module, LanguageModel)
        device = trainer.strategy.root_device
        times = self._timer.finish(device)
        peak = trainer.strategy.reduce(torch.tensor(times.peak_bytes or 0, device=device), reduce_op="max")
        flops = (pl_module.flops_per_batch or 0) * trainer.accumulate_grad_batches  # of this rank
        throughput = TokenThroughput()
        throughput.setup(trainer, pl_module, "fit")
        available, sharing = throughput.available_flops, ranks_a_batch(trainer)
        measurement = StepMeasurement(
            world_size=trainer.world_size,
            ranks_a_batch=sharing,
            tokens=self._tokens * trainer.accumulate_grad_batches * trainer.world_size // sharing,
            step_ms=times.median_ms,
            mean_step_ms=times.mean_ms,
            mfu=flops / (times.median_ms / 1e3) / available if available else None,
            peak_bytes=int(peak) if times.peak_bytes is not None else None,
            nccl_alone=times.nccl_alone,
            environment=environment(str(device)),
        )
        if trainer.is_global_zero:
            write_whole(self.settings.result, lambda part: part.write_text(json.dumps(asdict(measurement))))
