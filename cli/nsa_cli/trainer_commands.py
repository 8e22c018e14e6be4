"""`nsa fit | validate | test | predict`: LightningCLI with our model, data and callbacks."""

import sys
import traceback
from pathlib import Path

import torch
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.tokenizer import vocab_size_of
from nsa_lightning.training.callbacks import DocumentScores, FitReport, GateMonitor, TokenThroughput
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import ADAMW_DEFAULTS

_OWN_PACKAGES = ("nsa_kernels", "nsa_lightning", "nsa_cli")
_CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")


class NSACommandLine(LightningCLI):
    """The trainer's commands with the toolkit's own arguments, links and checks."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command on the command line alone: building the arguments of all four takes seconds."""
        command = sys.argv[1]
        return {command: LightningCLI.subcommands()[command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, and tie settings that must agree."""
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GateMonitor, "gate_monitor")
        parser.add_lightning_class_args(TokenThroughput, "throughput")
        parser.add_lightning_class_args(LearningRateMonitor, "learning_rate_monitor")
        parser.add_lightning_class_args(DocumentScores, "document_scores")
        parser.set_defaults(
            {
                "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": ADAMW_DEFAULTS},
                "checkpoint.monitor": "val/loss",
                "checkpoint.save_last": True,
                "checkpoint.filename": "step{step:06d}",
                "checkpoint.auto_insert_metric_name": False,
                "learning_rate_monitor.logging_interval": "step",
            }
        )
        parser.link_arguments("data.seq_len", "model.transformer.max_seq_len")
        parser.link_arguments(
            ("data.tokenizer.path", "data.tokenizer.vocab_size"),
            "model.transformer.vocab_size",
            compute_fn=lambda path, trained: vocab_size_of(path) if path else trained,
        )

    def before_instantiate_classes(self) -> None:
        """Check what would otherwise fail late or unclearly."""
        config = self.config[self.subcommand]
        if config.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            raise ValueError(
                f"trainer.accelerator must name hardware that PyTorch can use, got {config.trainer.accelerator}: "
                f"torch {torch.__version__} sees no GPU. Use --trainer.accelerator cpu or auto"
            )
        if self.subcommand == "fit" and config.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps must be at least 1, got {config.trainer.max_steps}: "
                "the learning-rate schedule ends there. Set --trainer.max_steps"
            )
        path = config.get("ckpt_path")
        if path and path not in _CHECKPOINT_WORDS and not Path(path).exists():
            raise ValueError(f"ckpt_path must be an existing checkpoint, got {path}")

    def _parse_ckpt_path(self) -> None:
        """Settings come from the config and the flags alone, never from a checkpoint."""


def run() -> int:
    """Run the trainer command of `sys.argv`; a mistake of the user's ends in one clear line and status 2."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        NSACommandLine(
            LanguageModel,
            PackedTextDataModule,
            auto_configure_optimizers=False,
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [FitReport()]},
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={"description": "Train and measure language models with Native Sparse Attention."},
        )
    except (ValueError, MisconfigurationException) as error:
        if not _is_deliberate(error):
            raise
        print(f"nsa {sys.argv[1]}: error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_deliberate(error: Exception) -> bool:
    """Whether the message was written for the user: raised by our own code, or Lightning's word on a setting."""
    if isinstance(error, MisconfigurationException):
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").startswith(_OWN_PACKAGES)
