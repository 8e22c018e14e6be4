"""Checkpoints on disk: written beside their predecessor and then put in its place, found again by a new run."""

import os
import shutil
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.checkpoint.run_files import KEY, read_run_files
from nsa_lightning.data.storage import writable
from nsa_lightning.training.sharded_checkpoint import META, check_shards, read_contents, read_meta, read_whole

_ABANDONED_AFTER = 3600.0
"""Seconds without a write after which what another machine was saving counts as left over from a killed save."""


def save_file(content: Any, path: Path) -> None:
    """Write a file that is either the old one or the new one, whole, whenever the process ends.

    Raises:
        ValueError: it cannot be written; nothing is left of it.
    """
    temporary = beside(path, "tmp")
    with writable(path):
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
        except Exception:
            temporary.unlink(missing_ok=True)
            raise
        publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Put a complete checkpoint in the place of the previous one.

    A directory cannot be replaced in one step: for a moment the previous one has the suffix `.old`, where
    `find_checkpoints` sees it. Another run may put its own there at the same time.
    """
    old = beside(path, "old")
    while True:
        if path.is_dir() or (temporary.is_dir() and path.exists()):
            remove(old)
            with suppress(FileNotFoundError):
                path.rename(old)
        try:
            temporary.replace(path)
        except OSError:
            if not path.exists():
                raise
        else:
            break
    remove(old)
    _remove_litter(path)


def beside(path: Path, suffix: str) -> Path:
    """A name beside a checkpoint that no other process uses: it tells which one does."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.{suffix}")


def _remove_litter(path: Path) -> None:
    """Remove what saves of this checkpoint left that were killed, and nothing that a running process may be writing."""
    for suffix in ("tmp", "old"):
        for litter in (path.with_name(f"{path.name}.{suffix}"), *path.parent.glob(f"{escape(path.name)}.*-*.{suffix}")):
            with suppress(OSError):  # another run may remove it as well
                if litter.exists() and _is_abandoned(litter):
                    remove(litter)


def _is_abandoned(litter: Path) -> bool:
    """Whether its process, if of this machine, is gone; of another machine, whether nothing was written for long."""
    owner, _, pid = litter.stem.rpartition("-")
    if owner.endswith(f".{socket.gethostname()}") and pid.isdigit():
        return not _is_running(int(pid))
    newest = max(file.stat().st_mtime for file in (litter, *litter.glob("**/*")))
    return newest < time.time() - _ABANDONED_AFTER


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def remove(path: Path) -> None:
    """Remove a checkpoint, be it a file or a directory, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_summary(path: Path, setting: str = "ckpt_path") -> dict[str, Any]:
    """A checkpoint without the numbers in its tensors; `setting` is what the user calls it.

    Raises:
        ValueError: it is incomplete, or none of ours.
    """
    if path.is_dir() and not (path / META).is_file():
        raise SettingError(f"{setting} must be a checkpoint of nsa fit, got the directory {path}, which lacks {META}")
    try:
        if path.is_dir():
            check_shards(path)
            summary = read_meta(path)
            shapes = {name: torch.empty(entry.size, device="meta") for name, entry in read_contents(path).items()}
            prefix = "state_dict."
            own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            summary["state_dict"] = own
        else:
            summary = torch.load(path, mmap=True, weights_only=True, map_location="meta")
    except Exception as error:  # anything may stand in a file: what went wrong is said, and the file is named
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise SettingError(f"{setting} must be a checkpoint of nsa fit, got {path}: {reason}") from error
    missing = {"state_dict", "pytorch-lightning_version"} - set(summary)
    if missing:
        raise SettingError(f"{setting} must be a checkpoint of nsa fit, got {path}, which lacks {sorted(missing)}")
    return summary


def check_same_sizes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model, naming what differs.

    Raises:
        ValueError: a parameter is missing on one side or has another shape.
    """
    differing = [
        f"{name} is {_shape(saved, name)} in the checkpoint and {_shape(own, name)} in the model"
        for name in sorted(own.keys() | saved.keys())
        if _shape(own, name) != _shape(saved, name)
    ]
    if differing:
        raise SettingError(
            f"ckpt_path must hold a model of the configured sizes; {len(differing)} parameters differ, "
            f"first: {'; '.join(differing[:3])}. Check model.transformer and data.tokenizer"
        )


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "missing"


def consolidate(checkpoint: str, output: str) -> int:
    """Write a sharded checkpoint as one file, with the optimizer's state; it passes through host memory.

    The file keeps the tokenizer and the config of its run: `nsa generate` and `nsa export` read it anywhere.

    Args:
        checkpoint: directory that `nsa fit` wrote with `--trainer.strategy fsdp2`.
        output: file to write; its directory is made if there is none.

    Returns:
        0.

    Raises:
        ValueError: the directory is no complete checkpoint, or the file exists.
    """
    if not Path(checkpoint).is_dir():
        raise SettingError(f"checkpoint must be a directory of nsa fit, got {checkpoint}")
    if Path(output).exists():
        raise SettingError(f"output must not exist, got {output}")
    read_summary(Path(checkpoint), "checkpoint")
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(f"output must be a file that can be written, got {output}: {error.strerror}") from error
    save_file(read_whole(Path(checkpoint)) | {KEY: read_run_files(Path(checkpoint))}, Path(output))
    print(f"{output}: {Path(output).stat().st_size / 1e9:.2f} GB")
    return 0


def find_checkpoints(*roots: Path, below: bool = True) -> list[Path]:
    """Everything in directories that looks like a checkpoint, complete or not, the last written first.

    Of directories that a save was killed in, or is writing, those that hold everything.

    Args:
        roots: the directories.
        below: look in the directories below as well.
    """
    paths = [path for root in roots for path in root.glob("**/*.ckpt*" if below else "*.ckpt*")]
    found = [p for p in paths if p.is_file() or p.suffix == ".ckpt" or (p / META).is_file()]
    return sorted(found, key=_written, reverse=True)


def find_last(*roots: Path, below: bool = True) -> Path | None:
    """The complete checkpoint in directories that was written last; incomplete ones are passed over, with a word."""
    for path in find_checkpoints(*roots, below=below):
        try:
            read_summary(path)
        except SettingError as error:
            rank_zero_warn(f"passed over: {error}")
        else:
            return path
    return None


def find_best(*roots: Path, below: bool = True) -> Path | None:
    """The checkpoint with the best validation, as the last one in directories knows it.

    A run that started from another one's checkpoint knows that one's best until its first validation: what is not in
    the directories is not meant.
    """
    last = find_last(*roots, below=below)
    if last is None:
        return None
    states = read_summary(last).get("callbacks", {}).values()
    paths = [Path(state["best_model_path"]) for state in states if state.get("best_model_path")]
    known = {path.resolve() for path in find_checkpoints(*roots, below=below)}
    places = [place for path in paths for place in (path, last.parent / path.name)]  # which may have been moved
    return next((place for place in places if place.resolve() in known), None)


def _written(path: Path) -> float:
    meta = path / META
    return (meta if meta.is_file() else path).stat().st_mtime


class RunCheckpointIO(TorchCheckpointIO):
    """Checkpoints of one file, replaced in one step; a sharded directory is read as if it were one.

    Lightning's own holds the whole file in memory, and goes through another file system if the system's directory for
    temporary files is on one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one file."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with writable(Path(path)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file or a directory; tensors and plain types only."""
        if Path(path).is_dir():
            read_summary(Path(path))
            return read_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs | {"weights_only": True})
