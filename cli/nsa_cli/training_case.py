"""One case of `nsa bench training`, in processes of its own: `python -m nsa_cli.training_case step …`."""

import os
import sys
import threading
import traceback
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from nsa_kernels.errors import SettingError

from nsa_cli.step_clock import StepClock
from nsa_cli.trainer_commands import NSACommandLine, check_accelerator, run_command_line
from nsa_lightning.benchmark.timing import first_line
from nsa_lightning.benchmark.training_step import StepSettings, random_loader
from nsa_lightning.training.callbacks import LossGuard

_STEPS_ALONE = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "max_epochs": -1,
}
"""Trainer settings: nothing but training steps."""


class _CaseTrainer(Trainer):
    """Makes `step` a command that takes what `fit` takes."""

    step = Trainer.fit


class CaseCommandLine(NSACommandLine):
    """Parses the settings of `nsa fit` and measures steps of it on random tokens."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The arguments of `fit`."""
        return {"step": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As `fit`, and what to measure."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(StepSettings, "step")

    def before_instantiate_classes(self) -> None:
        """Leave out whatever is beside the steps."""
        trainer = self.config[self.subcommand].trainer
        trainer.update(Namespace(_STEPS_ALONE))
        check_accelerator(trainer.accelerator)

    def make_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The config's trainer; of the callbacks the guard, which every step of a run has."""
        settings: StepSettings = self.config_init[self.subcommand].step
        guards = [callback for callback in callbacks if isinstance(callback, LossGuard)]
        changes = {"max_steps": settings.all_steps, "callbacks": [*guards, StepClock(settings)]}
        return Trainer(**config | changes)

    def run_command(self, command: str) -> None:
        """Measure; what fails ends at once, without a wait for the other ranks."""
        settings: StepSettings = self.config_init[self.subcommand].step
        data: Any = self.datamodule
        batches = settings.all_steps * self.trainer.accumulate_grad_batches
        vocab_size = self.model.transformer_config.vocab_size
        try:
            self.trainer.fit(self.model, random_loader(settings, vocab_size, data.seq_len, data.batch_size, batches))
        except Exception as error:
            if isinstance(error, SettingError):
                raise
            name = "" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: "
            settings.result.with_name(f"failure{self.trainer.global_rank}").write_text(name + first_line(error))
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)


def _end_with_parent() -> None:
    """End this process when the one that started the case is gone, however it went."""
    os.read(0, 1)
    os._exit(1)


def run() -> int:
    """Run the case of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return run_command_line(CaseCommandLine, _CaseTrainer)


if __name__ == "__main__":
    status = run()
    sys.stdout.flush()
    os._exit(status)  # without a wait for the other ranks
