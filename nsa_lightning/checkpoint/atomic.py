"""Checkpoints written beside their predecessor and then put in its place: there is always a complete one."""

import os
import shutil
import socket
import time
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch

from nsa_lightning.data.storage import writable

_ABANDONED_AFTER = 3600.0
"""Seconds without a write after which what another machine was saving counts as left over from a killed save."""


def save_file(content: Any, path: Path) -> None:
    """Write a file that is either the old one or the new one, whole, whenever the process ends.

    Its directory is made if there is none.

    Raises:
        ValueError: it cannot be written; nothing is left of it.
    """
    temporary = beside(path, "tmp")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
