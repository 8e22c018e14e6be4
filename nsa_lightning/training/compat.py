"""What training needs of Lightning, torch and torchmetrics that they do not promise to keep.

tests/training/test_compat.py checks each part by name, so that an upgrade that changes one is found there.
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric


def accumulates(trainer: Trainer) -> bool:
    """Whether the optimizer's step is yet to come after the current batch."""
    return trainer.fit_loop._should_accumulate()


def cluster_environment(trainer: Trainer) -> ClusterEnvironment:
    """What has started the processes; strategies of one device do not tell."""
    return trainer._accelerator_connector.cluster_environment


def ddp_option(strategy: DDPStrategy, name: str, default: Any) -> Any:
    """An argument that the strategy is to give to DistributedDataParallel."""
    return strategy._ddp_kwargs.get(name, default)


def time_between_savings(checkpoint: ModelCheckpoint) -> timedelta | None:
    """The callback's `train_time_interval`."""
    return checkpoint._train_time_interval


def save_last(checkpoint: ModelCheckpoint, trainer: Trainer) -> None:
    """Write `last.ckpt`, unless this step is saved already or nothing is to be saved."""
    if not checkpoint._should_skip_saving_checkpoint(trainer):
        checkpoint._save_last_checkpoint(trainer, checkpoint._monitor_candidates(trainer))


class MeshStrategy(ModelParallelStrategy):
    """Lightning's strategy for sharded models, whose subclass lays out the mesh and chooses the backend."""

    def make_mesh(self) -> DeviceMesh:
        """Lay out the ranks, once they can talk to each other."""
        raise NotImplementedError

    def choose_backend(self) -> str:
        """Name the backend of the default process group."""
        raise NotImplementedError

    def setup_environment(self) -> None:
        """Start the processes, and lay them out."""
        super(ModelParallelStrategy, self).setup_environment()
        self._setup_distributed()
        self._device_mesh = self.make_mesh()

    def _get_process_group_backend(self) -> str:
        return self.choose_backend()


def takes_loss_scale(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step itself divides the loss scale out, and does nothing if told so on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def leave_out_step(optimizer: Optimizer, left_out: Tensor) -> None:
    """Tell an optimizer that `takes_loss_scale` whether to do nothing in its next step: 1 or 0, float32 []."""
    optimizer.found_inf = left_out  # type: ignore[attr-defined]


def multiply(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors in place, all in few kernels."""
    torch._foreach_mul_(tensors, factor)


def set_last_rates(scheduler: LRScheduler, rates: list[Any]) -> None:
    """Set what `get_last_lr` returns until the next step."""
    scheduler._last_lr = rates


class CastMetric(Metric):
    """A metric that is told when its states have been moved or cast."""

    def on_cast(self) -> None:
        """Called after the states have been moved or cast."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        module = super()._apply(fn, exclude_state)
        self.on_cast()
        return module
