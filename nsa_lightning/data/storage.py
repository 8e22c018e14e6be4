"""Local paths and fsspec URLs: read alike, and a URL again when reading it fails."""

import errno
import io
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar
from uuid import uuid4

import numpy as np
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

PAUSES = (1.0, 4.0, 16.0)
"""Seconds to wait before a URL is read again; after the last attempt reading it has failed."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

READ_AHEAD = 2**22  # bytes of a URL that are asked for at once

log = logging.getLogger(__name__)


def is_url(place: Path | str) -> bool:
    """Whether fsspec reads it."""
    return isinstance(place, str) and "://" in place


def filesystem_of(url: str) -> "tuple[AbstractFileSystem, str]":
    """The filesystem of a URL, and the URL's path in it.

    fsspec keeps one filesystem a process and thread: ask anew instead of holding on to it, for a fork breaks it.

    Raises:
        ValueError: the protocol is unknown, or the package that speaks it is not installed.
    """
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SettingError(f"{url} cannot be read: {error}") from error
    return filesystem, path


def retried(name: str, action: Callable[[], Result]) -> Result:
    """What `action` returns; where it fails it is tried again after each of `PAUSES`.

    Raises:
        ValueError: it failed every time, or `name` does not exist or must not be read.
    """
    for attempt, pause in enumerate((*PAUSES, None), start=1):
        try:
            return action()
        except Exception as error:  # every filesystem raises its own
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {cause}"
            if _is_lasting(error):
                raise SettingError(f"{name} cannot be read: {reason}") from error
            if pause is None:
                raise SettingError(f"{name} cannot be read, {attempt} attempts failed: {reason}") from error
            log.warning("%s cannot be read (%s), trying again in %g s", name, reason, pause)
            time.sleep(pause)
    raise AssertionError


def open_binary(place: Path | str) -> io.BufferedReader:
    """Open a local file or a URL for reading; a URL goes on where a failure interrupted it."""
    if is_url(place):
        return io.BufferedReader(_RetriedFile(str(place)), READ_AHEAD)
    return Path(place).open("rb")


def save_array(stream: BinaryIO, array: NDArray[Any]) -> None:
    """Write what `np.save` writes, which loses the end of small arrays on a full disk without a word."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    stream.write(buffer.getbuffer())


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file that appears under its name once it is whole.

    Raises:
        ValueError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    with writable(path):
        try:
            with temporary.open("wb") as stream:
                yield stream
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Fill a directory that appears under its name, in place of one that was there, once it is whole.

    Raises:
        ValueError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    with writable(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Say which file the disk would not take."""
    try:
        yield
    except Exception as error:
        cause = system_error(error)
        if cause is None or isinstance(error, SettingError):
            raise
        named = cause.filename if cause.filename and not str(cause.filename).startswith(str(path)) else path
        raise SettingError(f"{named} cannot be written: {cause.strerror or cause}") from error


def system_error(error: BaseException) -> OSError | None:
    """The error of the system, or that behind a library's: torch, on a full disk, finds its file too short."""
    if isinstance(error, OSError):
        return error
    found: BaseException | None = error
    while found is not None and not (isinstance(found, OSError) and found.errno in _FULL):
        found = found.__cause__ or found.__context__
    return found


def _is_lasting(error: Exception) -> bool:
    """Whether trying again is of no use. Over http any failure is told as a missing file, with its cause."""
    if isinstance(error, FileNotFoundError):
        cause = error.__cause__
        status = getattr(cause, "status", 404)
        return not isinstance(cause, OSError) and status < 500 and status != 429
    return isinstance(error, PermissionError | ValueError)


class _RetriedFile(io.RawIOBase):
    """A URL that is opened again, at the same place, when reading it fails."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._stream: Any = None
        filesystem_of(url)  # what cannot be helped is said at once
        self._size = retried(url, lambda: self._open().size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = retried(self._url, lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        super().close()

    def _read(self, size: int) -> bytes:
        stream, self._stream = self._stream or self._open(), None  # after a failure it is not used again
        if stream.tell() != self._position:
            stream.seek(self._position)
        data = stream.read(size)
        if not data and self._size is not None and self._position < self._size:
            raise EOFError(f"it ends after {self._position} of {self._size} bytes")
        self._stream = stream
        return data

    def _open(self) -> Any:
        filesystem, path = filesystem_of(self._url)
        self._stream = filesystem.open(path, "rb", block_size=READ_AHEAD)
        return self._stream
