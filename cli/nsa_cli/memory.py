"""`nsa memory`: what a step of `nsa fit` with the same settings takes on each GPU, before anything is allocated."""

import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from nsa_cli.memory_settings import step_settings
from nsa_cli.trainer_commands import NSACommandLine, run_command_line
from nsa_lightning.memory.estimate import estimate_memory
from nsa_lightning.memory.report import report


class MemoryTrainer(Trainer):
    """Makes `memory` a command that takes what `fit` takes."""

    def memory(
        self,
        model: Any,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Tell what a step of `nsa fit` with the same settings takes on each GPU, before anything is allocated.

        Args:
            model: as of `fit`.
            train_dataloaders: as of `fit`.
            val_dataloaders: as of `fit`.
            datamodule: as of `fit`.
            ckpt_path: read in a config of `nsa fit`; a checkpoint changes nothing about memory, and is not opened.
            weights_only: read in a config of `nsa fit`; it changes nothing about memory.
        """


class MemoryCommandLine(NSACommandLine):
    """Parses the settings of `nsa fit` and prints an estimate instead of training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The arguments of `fit`."""
        return {"memory": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As `fit`, and for how many GPUs."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--world_size",
            type=int | None,
            default=None,
            help="GPUs of the run; if not given, trainer.devices × trainer.num_nodes",
        )

    def before_instantiate_classes(self) -> None:
        """The GPU, the data and a checkpoint need not be here."""

    def instantiate_classes(self) -> None:
        """The model and the data's settings, but no trainer."""
        self.config_init = self.parser.instantiate_classes(self.config)

    def run_command(self, command: str) -> None:
        """Print the estimate."""
        settings: Namespace = self.config_init[command]
        data, module = settings.data, settings.model
        step = step_settings(settings.trainer, data.seq_len, data.batch_size, settings.world_size)
        with warnings.catch_warnings(action="ignore"):  # PyTorch's, of tensors without numbers
            estimate = estimate_memory(module, step)
        print(report(estimate, step, module.activation_checkpointing, module.compile_blocks))


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    return run_command_line(MemoryCommandLine, MemoryTrainer)
