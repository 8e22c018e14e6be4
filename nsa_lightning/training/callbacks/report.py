"""The last words of a fit: how good the model is, where it is, how to look at it and how to go on."""

import shlex
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.training.callbacks.stop_signals import StopRequested


class FitReport(Callback):
    """Print the validation result beside a unigram model's, the best checkpoint and two commands to copy."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print after the last checkpoint is written, and only if training got somewhere."""
        log_dir = trainer.log_dir  # asks the other ranks, so on every rank
        if stage == "fit":
            self._print(trainer, log_dir, f" --trainer.max_steps {2 * trainer.global_step}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print where a run is and how it goes on that was told to stop and has saved its step."""
        if isinstance(exception, StopRequested):
            self._print(trainer, trainer.log_dir, "")  # every rank has stopped

    def _print(self, trainer: Trainer, log_dir: str | None, more_steps: str) -> None:
        if trainer.global_step > 0 and trainer.is_global_zero:
            lines = self._lines(trainer, log_dir, more_steps)
            print("\n" + "\n".join(f"{name:<18}{text}" for name, text in lines), flush=True)

    def _lines(self, trainer: Trainer, log_dir: str | None, more_steps: str) -> list[tuple[str, str]]:
        lines = _validation(trainer)
        checkpoint = trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        last = checkpoint.last_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        if best:
            lines.append(("best checkpoint", _relative(best)))
        if log_dir and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            lines.append(("look at it", f"tensorboard --logdir {_relative(log_dir)}"))
        if last and log_dir and Path(log_dir, "config.yaml").exists():
            command = f"nsa fit --config {_relative(Path(log_dir, 'config.yaml'))} --ckpt_path {_relative(last)}"
            lines.append(("train on", f"{command}{more_steps}"))
        return lines


def _validation(trainer: Trainer) -> list[tuple[str, str]]:
    """The last validation, and what a model without context reaches."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if "val/bits_per_byte" not in metrics:
        return []
    loss, perplexity = metrics["val/loss"], metrics["val/perplexity"]
    measured = f"(loss {loss:.3f} nats a token, perplexity {perplexity:.1f})"
    lines = [("validation", f"{metrics['val/bits_per_byte']:.3f} bits per byte {measured}")]
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, PackedTextDataModule):
        whole = trainer.limit_val_batches == 1.0 and isinstance(trainer.limit_val_batches, float)
        text = "the same text" if whole else "the whole validation split, of which a part was measured"
        lines.append(("unigram model", f"{data.unigram_bits_per_byte:.3f} bits per byte on {text}"))
    return lines


def _relative(path: str | Path) -> str:
    """The path as one would type it from here."""
    path = Path(path)
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
