"""A loss that is not finite, or far above what it was: caught before the step, and told with its documents."""

from collections import deque
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from torch import Tensor, distributed
from torch.optim import Optimizer

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.training.compat import leave_out_step, takes_loss_scale
from nsa_lightning.training.step import StepCallback, StepOutputs

_FEWEST_LOSSES = 20
"""Losses that must be known before another one can be called a spike."""


class _Verdict(NamedTuple):
    """What was found out about a step; on the device."""

    loss: Tensor  # of all ranks
    norm: Tensor  # of the gradient
    left_out: Tensor  # 1 if the optimizer leaves its step out


class _Suspect(NamedTuple):
    """A batch of the step, as its rank describes it to the others."""

    share: float  # of the step's loss
    description: str


class LossGuard(StepCallback):
    """Leave the weights alone in a step whose loss or gradient is not finite, and end the run; tell of spikes.

    All ranks decide alike: each judges the reduced loss and the gradient's norm, and one verdict against a step is
    enough. A fused optimizer learns the verdict on the device
    and the host reads it after the step; before the step of another optimizer the host waits for the device. With
    `trainer.precision: 16-mixed` it is the loss scaler that watches.

    Args:
        skip: leave out such steps, and those of spikes, and go on.
        max_skips: steps that may be left out in one run.
        spike_ratio: a loss above this multiple of the mean of the last `window` ones is a spike; none for no such test.
        window: losses in that mean.
    """

    def __init__(
        self, skip: bool = False, max_skips: int = 10, spike_ratio: float | None = 3.0, window: int = 100
    ) -> None:
        check_arguments(LossGuard.__init__, locals(), "loss_guard.")
        if max_skips < 1:
            raise SettingError(f"loss_guard.max_skips must be at least 1, got {max_skips}")
        if spike_ratio is not None and not 1 < spike_ratio < float("inf"):
            raise SettingError(f"loss_guard.spike_ratio must be above 1, got {spike_ratio}")
        if window < _FEWEST_LOSSES:
            raise SettingError(f"loss_guard.window must be at least {_FEWEST_LOSSES}, got {window}")
        self.skip, self.max_skips, self.spike_ratio = skip, max_skips, spike_ratio
        self._losses: deque[float] = deque(maxlen=window)
        self._batches: list[tuple[Tensor, PackedBatch]] = []
        self._verdict: _Verdict | None = None
        self._num_skips = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the losses of an earlier run."""
        self._losses.clear()
        self._num_skips = 0

    def on_before_update(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, loss: Tensor, norm: Tensor
    ) -> None:
        """Have the optimizer leave its step out if there is something wrong with it."""
        left_out = ~(loss.isfinite() & norm.isfinite())
        if self.skip:
            left_out |= loss > self._limit
        left_out = left_out.float()
        if distributed.is_initialized():  # one rank's fault is every rank's, also where gradients are not sharded
            distributed.all_reduce(left_out, distributed.ReduceOp.MAX)
        self._verdict = _Verdict(loss, norm, left_out)
        if takes_loss_scale(optimizer):  # fused: it has a flag for this
            leave_out_step(optimizer, left_out)
        elif left_out:
            optimizer.zero_grad(set_to_none=True)

    @property
    def _limit(self) -> float:
        """Losses above it are spikes."""
        if self.spike_ratio is None or len(self._losses) < _FEWEST_LOSSES:
            return float("inf")
        return self.spike_ratio * sum(self._losses) / len(self._losses)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PackedBatch, batch_idx: int
    ) -> None:
        """After a step, act on the verdict, before anything is saved."""
        step: StepOutputs = outputs
        self._batches.append((step["loss"], batch))
        if self._verdict is None:
            return
        loss, norm, left_out = torch.stack([part.double() for part in self._verdict]).tolist()
        spike = loss > self._limit
        if left_out or spike:
            self._tell(trainer, loss, norm, bool(left_out))
        else:
            self._losses.append(loss)
        self._batches, self._verdict = [], None

    def _tell(self, trainer: Trainer, loss: float, norm: float, left_out: bool) -> None:
        """Warn, or raise where the run is to end.

        Raises:
            ValueError: the loss or the gradient is not finite and steps are not to be skipped, or too many were.
        """
        found = f"train/loss {loss:.4g}, gradient norm {norm:.4g} in step {trainer.global_step - 1}"
        if self._limit < float("inf"):
            found += f", after a mean loss of {sum(self._losses) / len(self._losses):.4g}"
        found += f": {self._worst(trainer)}"
        self._num_skips += left_out
        if not left_out:
            rank_zero_warn(f"the loss spikes: {found}. loss_guard.skip leaves such steps out")
        elif not self.skip:
            raise SettingError(
                f"the loss must be finite, got {found}. The weights are those of before. Go on from the last "
                "checkpoint, with loss_guard.skip to leave such steps out"
            )
        elif self._num_skips > self.max_skips:
            raise SettingError(
                f"loss_guard.max_skips={self.max_skips} steps were left out and one more is due: {found}"
            )
        else:
            rank_zero_warn(f"step left out, {self._num_skips} of at most {self.max_skips}: {found}")

    def _worst(self, trainer: Trainer) -> str:
        """The batch with the greatest share of the loss, of all ranks."""
        suspects = [_Suspect(float(share), _describe(trainer, batch)) for share, batch in self._batches]
        if distributed.is_initialized():
            gathered: list[Any] = [None] * trainer.world_size
            distributed.all_gather_object(gathered, suspects)
            suspects = [suspect for rank in gathered for suspect in rank]
        return max(suspects, key=lambda suspect: float("inf") if suspect.share != suspect.share else suspect.share)[1]


def _describe(trainer: Trainer, batch: PackedBatch, characters: int = 60) -> str:
    """Rank, lengths of the documents and how the first begins."""
    lengths = batch.cu_seqlens.diff().tolist()
    text = f"rank {trainer.global_rank} had {len(lengths)} documents of {', '.join(map(str, lengths[:8]))}"
    text += f"{' …' if len(lengths) > 8 else ''} tokens"
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PackedTextDataModule):
        beginning = data.tokenizer.decode(batch.tokens[:characters].tolist())[:characters]
        text += f", the first begins {beginning!r}"
    return text
