"""`nsa fit | validate | test | predict`: LightningCLI with our model, data and callbacks."""

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from nsa_kernels.errors import SettingError

from nsa_cli.data_origin import with_one_origin
from nsa_cli.errors import print_error, silence_threads, user_message
from nsa_cli.lightning_compat import TrainerCommandLine
from nsa_cli.parser import OneLineParser
from nsa_cli.trainer_settings import check_seed, check_trainer_settings
from nsa_lightning.checkpoint.find import find_best, find_last
from nsa_lightning.checkpoint.run_files import CONFIG, TOKENIZER
from nsa_lightning.checkpoint.summary import read_summary
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sets import configured_vocab_size
from nsa_lightning.data.storage import whole_file, writable
from nsa_lightning.paths import expand_path
from nsa_lightning.training.callbacks import (
    Continuations,
    DocumentScores,
    FitReport,
    GateMonitor,
    LossGuard,
    ModelSize,
    RunCheckpoint,
    TokenThroughput,
)
from nsa_lightning.training.checkpoint_io import RunCheckpointIO
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import ADAMW_DEFAULTS
from nsa_lightning.training.processes import check_processes
from nsa_lightning.training.run_directory import RunDirectories, earlier_directories, run_directory

_CONFIG_FLAGS = ("--config", "-c")
_PATHS = ("default_root_dir", "save_dir", "dirpath", "dir", "root_dir", "log_dir")
"""Settings of the trainer and of its loggers, callbacks and profilers that are paths."""
_MEASUREMENTS = ("validate", "test", "predict")
_FOREIGN_WORDS = ("hpc", "registry")
"""Words for a checkpoint that Lightning knows and we do not."""


class NSAParser(OneLineParser, LightningArgumentParser):
    """Lightning's parser with what all commands share."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse, with `~` and `$VAR` in the paths of configs."""
        words = list(sys.argv[1:] if args is None else args)
        for index, word in enumerate(words):
            flag, equals, path = word.partition("=")
            if flag in _CONFIG_FLAGS and equals:
                words[index] = f"{flag}={expand_path(path)}"
            elif index and words[index - 1] in _CONFIG_FLAGS:
                words[index] = expand_path(word)
        return super().parse_args(words, *more, **kwargs)


class SaveRun(SaveConfigCallback):
    """Keep beside the checkpoints what is needed to use them: the config and the tokenizer."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml`, and `tokenizer.json` beside it."""
        directory = run_directory(trainer)  # asks the other ranks, so on every rank
        if trainer.is_global_zero and not self.already_saved:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            with writable(directory):
                directory.mkdir(parents=True, exist_ok=True)
            with whole_file(directory / CONFIG) as stream:
                stream.write(self.parser.dump(self.config, skip_none=False).encode())
            data.tokenizer.save(directory / TOKENIZER)
            self.already_saved = True


class NSACommandLine(TrainerCommandLine):
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

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with a later origin of the text in the place of an earlier one.

        `~` and `$VAR` are expanded in the paths of Lightning's own classes; ours expand them themselves.
        """
        self.config = parser.parse_args(with_one_origin(sys.argv[1:]))
        config = self.config[self.config.subcommand]
        check_seed(config.seed_everything)
        path = config.get("ckpt_path")
        if path:
            config.ckpt_path = expand_path(path)
        _expand_paths(config.trainer)

    def before_instantiate_classes(self) -> None:
        """Check what would otherwise fail late or unclearly."""
        config = self.config[self.subcommand]
        check_accelerator(config.trainer.accelerator)
        check_trainer_settings(config.trainer, str(self.subcommand))
        path = config.get("ckpt_path")
        if path and path not in ("best", "last"):
            _check_checkpoint(Path(path))
        elif not path and self.subcommand != "fit" and config.model.init_from is None:
            raise SettingError(
                "ckpt_path must name the checkpoint to measure, got none. "
                "Set --ckpt_path, or --model.init_from to measure what training starts from"
            )

    def after_instantiate_classes(self) -> None:
        """Find the checkpoint that a word stands for: which are the run's own, its logger knows."""
        word = self.config[self.subcommand].get("ckpt_path")
        if word in ("best", "last") and self.subcommand in LightningCLI.subcommands():  # others do not read it
            setting = self.config[self.subcommand].trainer.logger
            loggers = self._run_loggers if self.subcommand in _MEASUREMENTS else self.trainer.loggers
            directories = earlier_directories(self.trainer, loggers, setting)
            path = _find_checkpoint(word, directories, required=self.subcommand != "fit")
            self.config[self.subcommand].ckpt_path = self.config_init[self.subcommand].ckpt_path = path

    def make_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Leave out what the trainer's own switches turn off and what a measurement does not need; write our way."""
        if self.subcommand in _MEASUREMENTS:
            loggers = config["logger"] if isinstance(config["logger"], list) else [config["logger"]]
            default = TensorBoardLogger(config.get("default_root_dir") or Path.cwd(), "lightning_logs")  # Lightning's
            self._run_loggers = [default if each in (True, None) else each for each in loggers if each is not False]
            kept = [each for each in loggers if not isinstance(each, TensorBoardLogger | CSVLogger | bool | None)]
            config["logger"] = kept or False  # the others would begin a version of the run with nothing in it
            self.save_config_callback = None  # that of the run stays as it is
        if config.get("logger") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ModelCheckpoint)]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not _any_of(given, ProgressBar):
            callbacks.append(TQDMProgressBar())  # the same whether or not the package `rich` is installed
        if config.get("enable_model_summary") is not False and not _any_of(given, ModelSummary):
            callbacks.append(ModelSize())
            config["enable_model_summary"] = False
        plugins = config.get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not _any_of(plugins, CheckpointIO):
            config["plugins"] = [*plugins, RunCheckpointIO()]
        trainer = super().make_trainer(config, callbacks)
        check_processes(trainer)
        return trainer


def _expand_paths(settings: Any) -> None:
    """Expand `~` and `$VAR`, in place, in what settings call paths at any depth."""
    if isinstance(settings, list):
        for each in settings:
            _expand_paths(each)
    elif isinstance(settings, Namespace | dict):
        for name, value in list(vars(settings).items() if isinstance(settings, Namespace) else settings.items()):
            if name in _PATHS and isinstance(value, str | os.PathLike):
                settings[name] = expand_path(os.fspath(value))
            else:
                _expand_paths(value)


def _any_of(objects: Iterable[Any], kind: type) -> bool:
    return any(isinstance(each, kind) for each in objects)


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
    silence_threads()
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
                "allow_abbrev": False,
                "description": "Train and measure language models with Native Sparse Attention.",
            },
        )
    except SIGTERMException as stop:  # the run has ended after its batch
        return stop.code if isinstance(stop.code, int) else 128 + signal.SIGTERM
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print_error(sys.argv[1], message)
        return 2
    return 0


def _silence() -> None:
    """Leave out what Lightning says in every run and no user can act on."""
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(lambda record: not re.search("litlogger|^TPU available: False", record.getMessage()))


def _check_checkpoint(path: Path) -> None:
    """Refuse what is no checkpoint of `nsa fit`, before anything is read that takes long."""
    if str(path) in _FOREIGN_WORDS:
        raise SettingError(f"ckpt_path must be the path of a checkpoint, best or last, got the word {path}")
    if not path.exists():
        raise SettingError(f"ckpt_path must be an existing checkpoint, got {path}")
    read_summary(path)


def _find_checkpoint(word: str, directories: RunDirectories, required: bool) -> str | None:
    """The best or last complete checkpoint of all versions of a run; none where a run may start anew."""
    path = {"best": find_best, "last": find_last}[word](*directories.checkpoints, depth=1, report=rank_zero_warn)
    if path is None and required:
        raise SettingError(
            f"ckpt_path={word} needs a complete checkpoint of this run under {directories.root}, there is none"
        )
    found = path or f"nothing of this run under {directories.root}, starting anew"
    rank_zero_info(f"ckpt_path={word}: {found}")
    return str(path) if path else None
