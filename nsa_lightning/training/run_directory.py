"""Where a run keeps its files, and which directories are its own."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from nsa_lightning.checkpoint.run_files import CHECKPOINTS, CONFIG

_LOCAL = (TensorBoardLogger, CSVLogger)
"""Loggers whose runs are told apart by their directories alone."""
_IDENTITY = (
    "name",
    "version",
    "id",
    "project",
    "project_name",
    "entity",
    "workspace",
    "experiment_name",
    "experiment_key",
    "run_name",
    "run_id",
)
"""Settings of loggers that name a run among those whose checkpoints lie beside its own."""


class RunDirectories(NamedTuple):
    """Where the checkpoints of a run are."""

    root: Path  # below which they are, for the user
    checkpoints: list[Path]  # directories that hold them, of all its versions


def run_directory(trainer: Trainer) -> Path:
    """Where the files of a run lie, with the checkpoints in it or in a directory below: of every version its own.

    Every rank calls it, once the loggers have begun.
    """
    return Path(trainer.strategy.broadcast(str(_own_directory(trainer, trainer.loggers))))


def earlier_directories(trainer: Trainer, loggers: Sequence[Logger], setting: Any) -> RunDirectories:
    """Where a run may have left its checkpoints when it ran before.

    Those of a logger are in a directory for each version, beside the versions of others. A directory is this run's if
    its config gave the logger the same names, or if the logger's settings lead there.

    Args:
        trainer: of the run, or of a measurement, which does without the run's loggers.
        loggers: of the run.
        setting: what the trainer's setting says of them.
    """
    dirpath = _given_dirpath(trainer)
    if dirpath is not None:
        return RunDirectories(dirpath, [dirpath])
    own = _own_directory(trainer, loggers) / CHECKPOINTS
    if not loggers:
        return RunDirectories(own, [own])
    first = loggers[0]
    root, identity = Path(first.save_dir or trainer.default_root_dir), _identity(setting)
    if isinstance(first, _LOCAL):
        root = root / str(first.name)
        places = [place for place in sorted(root.glob(f"*/{CHECKPOINTS}")) if place != own]
        return RunDirectories(root, [own, *(each for each in places if _is_same_run(each.parent, identity, True))])
    places = sorted(root.glob(f"*/*/{CHECKPOINTS}"))  # a directory a project, and in it one a run
    return RunDirectories(root, [each for each in places if _is_same_run(each.parent, identity, False)])


def _given_dirpath(trainer: Trainer) -> Path | None:
    """The directory that the user has set for the checkpoints."""
    given = (getattr(callback, "given_dirpath", None) for callback in trainer.checkpoint_callbacks)  # of RunCheckpoint
    return next((Path(path) for path in given if path is not None), None)


def _own_directory(trainer: Trainer, loggers: Sequence[Logger]) -> Path:
    dirpath = _given_dirpath(trainer)
    if dirpath is not None:
        return dirpath
    if not loggers:
        return Path(trainer.default_root_dir)
    logger = loggers[0]  # as Lightning's ModelCheckpoint reads it
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


def _identity(logger: Any) -> dict[str, Any]:
    """What the settings of the first logger call the run, and where it is known if not here."""
    first = logger[0] if isinstance(logger, list) and logger else logger
    if not isinstance(first, Mapping | Namespace):
        return {}
    settings = {**(first.get("init_args") or {}), **(first.get("dict_kwargs") or {})}
    identity = {name: settings[name] for name in _IDENTITY if settings.get(name) is not None}
    kind = str(first.get("class_path")).rpartition(".")[2]
    return identity if kind in {each.__name__ for each in _LOCAL} else {**identity, "class_path": kind}


def _is_same_run(directory: Path, identity: dict[str, Any], without_config: bool) -> bool:
    """Whether the config in a directory gives the run the same names; `without_config` if there is none."""
    try:
        saved = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))["trainer"]["logger"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return without_config
    return _identity(saved) == identity
