"""The checkpoints of a run: the last one written, and the one with the best validation."""

import warnings
from collections.abc import Callable
from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.checkpoint.sharded import META
from nsa_lightning.checkpoint.summary import read_summary

_OF_A_RUN = 3
"""How many names deep a checkpoint lies below runs/name: version_N/checkpoints/last.ckpt."""


def find_checkpoints(*roots: Path, depth: int = _OF_A_RUN) -> list[Path]:
    """Everything in directories that looks like a checkpoint, complete or not, the last written first.

    Of directories that a save was killed in, or is writing, those that hold everything.

    Args:
        roots: the directories.
        depth: how many names deep to look below them; 1 is in the directories alone.
    """
    paths = [path for root in roots for level in range(depth) for path in root.glob("*/" * level + "*.ckpt*")]
    found = [p for p in paths if p.is_file() or p.suffix == ".ckpt" or (p / META).is_file()]
    return sorted(found, key=_written, reverse=True)


def find_last(
    *roots: Path,
    depth: int = _OF_A_RUN,
    setting: str = "ckpt_path",
    report: Callable[[str], object] = warnings.warn,
) -> Path | None:
    """The complete checkpoint in directories that was written last; incomplete ones are passed over.

    Args:
        roots: the directories.
        depth: as of `find_checkpoints`.
        setting: what the user calls the checkpoint.
        report: is told which ones are passed over, and why.
    """
    for path in find_checkpoints(*roots, depth=depth):
        try:
            read_summary(path, setting)
        except SettingError as error:
            report(f"passed over: {error}")
        else:
            return path
    return None


def find_best(*roots: Path, depth: int = _OF_A_RUN, report: Callable[[str], object] = warnings.warn) -> Path | None:
    """The checkpoint with the best validation, as the last one in directories knows it.

    A run that started from another one's checkpoint knows that one's best until its first validation: what is not in
    the directories is not meant. Arguments as of `find_last`.
    """
    last = find_last(*roots, depth=depth, report=report)
    if last is None:
        return None
    states = read_summary(last).get("callbacks", {}).values()
    paths = [Path(state["best_model_path"]) for state in states if state.get("best_model_path")]
    known = {path.resolve() for path in find_checkpoints(*roots, depth=depth)}
    places = [place for path in paths for place in (path, last.parent / path.name)]  # which may have been moved
    return next((place for place in places if place.resolve() in known), None)


def _written(path: Path) -> float:
    meta = path / META
    return (meta if meta.is_file() else path).stat().st_mtime
