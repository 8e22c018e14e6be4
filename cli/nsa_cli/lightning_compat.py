"""What the trainer's commands need of LightningCLI beside its public methods; tests/cli/test_compat.py checks it."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI


class TrainerCommandLine(LightningCLI):
    """LightningCLI whose subclass makes the trainer and runs the command; it reads no settings of checkpoints."""

    def make_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Make the trainer; LightningCLI adds the callbacks of its own defaults.

        Args:
            config: arguments of the trainer, its objects made.
            callbacks: those that have settings of their own beside the trainer's.
        """
        return super()._instantiate_trainer(config, callbacks)

    def run_command(self, command: str) -> None:
        """Call the trainer's method of this name."""
        super()._run_subcommand(command)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return self.make_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_command(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Model settings come from the config and the flags, never from a checkpoint."""
