"""`nsa fit | validate | test | predict`: LightningCLI with our model, data and callbacks."""

import logging
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from nsa_kernels.errors import SettingError

from nsa_cli.errors import print_error
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sets import configured_vocab_size
from nsa_lightning.training.callbacks import (
    Continuations,
    DocumentScores,
    FitReport,
    GateMonitor,
    LossGuard,
    RunCheckpoint,
    TokenThroughput,
)
from nsa_lightning.training.checkpoints import RunCheckpointIO, find_best, find_last, read_summary
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import ADAMW_DEFAULTS
from nsa_lightning.training.processes import check_processes

_FOREIGN_WORDS = ("hpc", "registry")
"""Words for a checkpoint that Lightning knows and we do not."""
_LINK_FAILURE = re.compile(r"^Call to compute_fn of link .*? failed: ", re.DOTALL)


class NSAParser(LightningArgumentParser):
    """Lightning's parser that says a mistake in one line instead of below all its options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message, without jsonargparse's words on linked settings, and exit with status 2."""
        print_error(sys.argv[1], _LINK_FAILURE.sub("", message.strip()))
        sys.exit(2)


class SaveRun(SaveConfigCallback):
    """Keep beside the checkpoints what is needed to use them: the config and the tokenizer."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`, and `tokenizer.json` beside it."""
        super().setup(trainer, pl_module, stage)
        log_dir = trainer.log_dir  # asks the other ranks, so on every rank
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and log_dir is not None:
            data.tokenizer.save(Path(log_dir, "tokenizer.json"))


class NSACommandLine(LightningCLI):
    """The trainer's commands with the toolkit's own arguments, links and checks."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The command on the command line alone: building the arguments of all four takes seconds."""
        command = sys.argv[1]
        return {command: LightningCLI.subcommands()[command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that every run has, and tie settings that must agree."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(GateMonitor, "gate_monitor")
        parser.add_lightning_class_args(LossGuard, "loss_guard")
        parser.add_lightning_class_args(TokenThroughput, "throughput")
        parser.add_lightning_class_args(LearningRateMonitor, "learning_rate_monitor")
        parser.add_lightning_class_args(DocumentScores, "document_scores")
        parser.add_lightning_class_args(Continuations, "generate")
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
            ("data.tokenizer.path", "data.tokenizer.vocab_size", "data.prepared", "data.mixture"),
            "model.transformer.vocab_size",
            compute_fn=configured_vocab_size,
        )

    def before_instantiate_classes(self) -> None:
        """Check what would otherwise fail late or unclearly."""
        config = self.config[self.subcommand]
        check_accelerator(config.trainer.accelerator)
        if self.subcommand == "fit" and config.trainer.max_steps < 1:
            raise SettingError(
                f"trainer.max_steps must be at least 1, got {config.trainer.max_steps}: "
                "the learning-rate schedule ends there. Set --trainer.max_steps"
            )
        path = config.get("ckpt_path")
        if path in ("best", "last"):
            config.ckpt_path = _find_checkpoint(path, _run_directory(config), required=self.subcommand != "fit")
        elif path:
            _check_checkpoint(Path(path))
        elif self.subcommand != "fit" and config.model.init_from is None:
            raise SettingError(
                "ckpt_path must name the checkpoint to measure, got none. "
                "Set --ckpt_path, or --model.init_from to measure what training starts from"
            )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out the callbacks that the trainer's own switches turn off; write checkpoints our way."""
        if config.get("logger") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
            if self.subcommand != "fit":  # nothing of the run is kept: it has no directory of its own
                self.save_config_callback = None
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            config["plugins"] = [*plugins, RunCheckpointIO()]
        trainer = super()._instantiate_trainer(config, callbacks)
        check_processes(trainer)
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Model settings come from the config and the flags, never from a checkpoint."""


def check_accelerator(accelerator: Any) -> None:
    """Refuse a GPU where PyTorch sees none."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise SettingError(
            f"trainer.accelerator must name hardware that PyTorch can use, got {accelerator}: "
            f"torch {torch.__version__} sees no GPU. Use --trainer.accelerator cpu or auto"
        )


def run() -> int:
    """Run the trainer command of `sys.argv` and return its exit status."""
    return run_command_line(NSACommandLine, Trainer)


def run_command_line(command_line: type[NSACommandLine], trainer_class: type[Trainer]) -> int:
    """Parse `sys.argv`, run the command and return its exit status.

    A mistake of the user's ends in one clear line and status 2, a run stopped by SIGTERM in status 143.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _silence()
    try:
        command_line(
            LanguageModel,
            PackedTextDataModule,
            trainer_class=trainer_class,
            auto_configure_optimizers=False,
            trainer_defaults={"use_distributed_sampler": False, "callbacks": [FitReport()]},
            save_config_callback=SaveRun,
            save_config_kwargs={"overwrite": True},
            parser_class=NSAParser,
            seed_everything_default=0,
            parser_kwargs={
                "prog": "nsa",
                "description": "Train and measure language models with Native Sparse Attention.",
            },
        )
    except (SettingError, MisconfigurationException) as error:
        print_error(sys.argv[1], str(error))
        return 2
    except SIGTERMException as stop:  # the run has ended after its batch
        return stop.code if isinstance(stop.code, int) else 128 + signal.SIGTERM
    return 0


def _silence() -> None:
    """Leave out what Lightning says in every run and no user can act on."""
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: "litlogger" not in record.getMessage())


def _check_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint of `nsa fit`, before anything is read that takes long."""
    if str(path) in _FOREIGN_WORDS:
        raise SettingError(f"ckpt_path must be the path of a checkpoint, best or last, got the word {path}")
    if not path.exists():
        raise SettingError(f"ckpt_path must be an existing checkpoint, got {path}")
    read_summary(path)


def _find_checkpoint(word: str, root: Path, required: bool) -> str | None:
    """The best or last complete checkpoint of all versions of a run; none where a run may start anew."""
    path = {"best": find_best, "last": find_last}[word](root)
    if path is None and required:
        raise SettingError(f"ckpt_path={word} needs a complete checkpoint under {root}, there is none")
    rank_zero_info(f"ckpt_path={word}: {path}" if path else f"ckpt_path={word}: nothing under {root}, starting anew")
    return str(path) if path else None


def _run_directory(config: Namespace) -> Path:
    """Where runs with this config write their checkpoints, whatever their version."""
    logger = config.trainer.logger[0] if isinstance(config.trainer.logger, list) else config.trainer.logger
    root = config.trainer.default_root_dir or "."
    if config.checkpoint.dirpath is not None:
        return Path(config.checkpoint.dirpath)
    if logger is False:
        return Path(root, "checkpoints")
    settings = logger.get("init_args", Namespace()) if isinstance(logger, Namespace) else Namespace()
    return Path(settings.get("save_dir") or root, settings.get("name", "lightning_logs") or "")
