"""The last words of a fit: how good the model is, where it is, how to look at it and how to go on."""

import math
import shlex
import time
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loggers import TensorBoardLogger

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.paths import relative
from nsa_lightning.training.callbacks.stop_signals import StopRequested
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import group_schedules
from nsa_lightning.training.run_directory import CONFIG, run_directory


class FitReport(Callback):
    """Print the validation result beside a unigram model's, the best checkpoint and commands to copy."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print after the last checkpoint is written, and only if training got somewhere."""
        if stage == "fit":
            self._print(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Print where a run is and how it goes on that was told to stop and has saved its step."""
        if isinstance(exception, StopRequested):
            self._print(trainer, pl_module)  # every rank has stopped

    def _print(self, trainer: Trainer, pl_module: LightningModule) -> None:
        directory = run_directory(trainer)  # asks the other ranks, so on every rank
        if trainer.global_step > 0 and trainer.is_global_zero:
            lines = self._lines(trainer, pl_module, directory)
            print("\n" + "\n".join(f"{name:<18}{text}" for name, text in lines), flush=True)

    def _lines(self, trainer: Trainer, pl_module: LightningModule, directory: Path) -> list[tuple[str, str]]:
        lines = _validation(trainer)
        checkpoint = trainer.checkpoint_callback
        best = checkpoint.best_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        last = checkpoint.last_model_path if isinstance(checkpoint, ModelCheckpoint) else ""
        if best:
            lines.append(("best checkpoint", _relative(best)))
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards:
            lines.append(("look at it", f"tensorboard --logdir {_relative(boards[0].log_dir)}"))
        if last and (directory / CONFIG).exists():
            options, words = _train_on(trainer, pl_module, directory / CONFIG)
            command = f"nsa fit --config {_relative(directory / CONFIG)} --ckpt_path {_relative(last)}"
            lines += [("train on", f"{command}{options}"), ("", words)]
        return lines


def _train_on(trainer: Trainer, pl_module: LightningModule, config: Path) -> tuple[str, str]:
    """The options with which a run trains on, and what its learning rate does then."""
    done, total = trainer.global_step, trainer.max_steps
    if done < total:
        options, words = "", f"goes on at step {done} of {total}, along the same schedule"
        more_time = _more_time(trainer)
        if more_time is not None and _setting(config, "max_time") is not None:
            options += f" --trainer.max_time {more_time}"
            words += "; trainer.max_time counts from the first start: this is the same time again"
        if trainer.max_epochs not in (None, -1) and trainer.current_epoch >= trainer.max_epochs:
            options += " --trainer.max_epochs -1"
        return options, words
    options = f" --trainer.max_steps {2 * done}"
    words = f"the schedule has ended with step {done}"
    if isinstance(pl_module, LanguageModel):
        now, then = (_rate(trainer, pl_module, *step) for step in ((done - 1, total), (done, 2 * done)))
        if now != then:
            change = "raises" if then > now else "lowers"
            words += f"; one of {2 * done} steps {change} the learning rate again, from {now:.3g} to {then:.3g}"
    return options, words


def _rate(trainer: Trainer, module: LanguageModel, step: int, total_steps: int) -> float:
    """The learning rate of the first parameter group in a step of a run."""
    optimizer = trainer.optimizers[0]
    factor = group_schedules(optimizer, module.new_parts, module.schedule, total_steps)[0](step)
    return float(optimizer.param_groups[0]["initial_lr"] * factor)


def _more_time(trainer: Trainer) -> str | None:
    """The limit that gives a run as much time again as it had since its last start, if it has used up its own."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        left = callback.time_remaining() if isinstance(callback, Timer) else None
        if left is not None and left <= 0:
            start, end = callback.start_time(), callback.end_time() or time.monotonic()
            seconds = math.ceil(callback.time_elapsed() + end - (start or end))
            minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
            return f"{days:02}:{hours % 24:02}:{minutes % 60:02}:{seconds % 60:02}"
    return None


def _setting(config: Path, name: str) -> Any:
    """A setting of the trainer, as the run's config has it."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    return settings.get("trainer", {}).get(name)


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
    """The path as one would type it from here, quoted for a shell."""
    return shlex.quote(str(relative(path)))
