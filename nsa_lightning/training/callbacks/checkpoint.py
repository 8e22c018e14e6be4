"""Checkpoints: the best by validation, and the last step of the run whatever ended it."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from nsa_kernels.errors import SettingError

from nsa_lightning.paths import expand_path
from nsa_lightning.training.callbacks.stop_signals import StopRequested, StopSignals
from nsa_lightning.training.compat import accumulates, save_last, time_between_savings


class RunCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint that also writes `last.ckpt` where training ends or is told to.

    Lightning itself leaves it at the last validation: the steps after that would be lost. At SIGTERM or Ctrl-C, on
    any rank, all ranks finish their step, save it and end with status 143 or 130; a validation is broken off and not
    made up for.

    Args:
        last_every_n_steps: steps between two savings of `last.ckpt`, beside those after a validation: what a run that
            is killed can lose.
    """

    def __init__(self, *args: Any, last_every_n_steps: int | None = None, **kwargs: Any) -> None:
        dirpath, *others = args or (kwargs.pop("dirpath", None),)
        super().__init__(dirpath if dirpath is None else expand_path(str(dirpath)), *others, **kwargs)
        if last_every_n_steps is not None and last_every_n_steps < 1:
            raise SettingError(f"checkpoint.last_every_n_steps must be at least 1, got {last_every_n_steps}")
        interval = time_between_savings(self)
        if interval is not None and interval <= timedelta():
            raise SettingError(f"checkpoint.train_time_interval must be above 0, got {interval}")
        self.last_every_n_steps = last_every_n_steps
        self.given_dirpath = (
            None if self.dirpath is None else str(self.dirpath)
        )  # Lightning fills it in where it is not
        self._signals = StopSignals()
        self._trains = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the directory of the checkpoints; a measurement writes none."""
        self._trains = stage == "fit"
        if self._trains:
            super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best checkpoint of a run that goes on, and in the same directory all that are kept.

        A run that goes on in another directory, as every version does, keeps its own best ones there.
        """
        if self._trains:
            same = self.dirpath == state_dict.get("dirpath", self.dirpath)
            super().load_state_dict(
                state_dict if same else self.state_dict() | {"best_model_path": state_dict["best_model_path"]}
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch for signals from the first batch on."""
        self._signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch for signals, where nothing was validated first."""
        super().on_train_start(trainer, pl_module)
        self._signals.install()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, or time to stop."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if accumulates(trainer):
            return
        if self.last_every_n_steps is not None and trainer.global_step % self.last_every_n_steps == 0:
            save_last(self, trainer)
        self._stop_if_told_to(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Break off a validation within a fit: it may take longer than there is time to stop."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_if_told_to(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step unless it is saved already."""
        super().on_train_end(trainer, pl_module)
        save_last(self, trainer)
        self._signals.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """SIGTERM ends the process again."""
        super().on_exception(trainer, pl_module, exception)
        self._signals.release()

    def _stop_if_told_to(self, trainer: Trainer) -> None:
        signum = self._signals.agreed()
        if signum:
            save_last(self, trainer)
            raise StopRequested(trainer, signum)
