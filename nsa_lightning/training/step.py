"""What a training step tells its callbacks, and what they may ask of it."""

from typing import TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from nsa_lightning.model.statistics import BranchStatistics


class StepOutputs(TypedDict):
    """What `LanguageModel.training_step` returns and `on_train_batch_end` of every callback gets."""

    loss: Tensor  # this rank's share of the step's loss, []
    statistics: dict[int, BranchStatistics]  # of this rank's tokens by NSA layer; empty unless a callback watches


class StepCallback(Callback):
    """A callback that takes part in training steps: `LanguageModel` calls these hooks beside those of Lightning."""

    def watches_attention(self, trainer: Trainer) -> bool:
        """Whether the batch that follows is to have `statistics` among its outputs."""
        return False

    def on_before_update(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, loss: Tensor, norm: Tensor
    ) -> None:
        """Called when gradients are complete and clipped, right before the optimizer's step.

        Not called with `trainer.precision: 16-mixed`, where the loss scaler decides about the step.

        Args:
            trainer: of the run.
            pl_module: the model.
            optimizer: that is about to step.
            loss: mean over the scored tokens of all ranks and all batches of the step, [] on the device.
            norm: of the gradient before it was clipped, [] on the device.
        """
