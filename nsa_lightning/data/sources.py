"""What `data.sources` stand for: files on disk and behind URLs, and the parts they are read in."""

import errno
import glob
import itertools
import logging
import os
import re
import stat
import sysconfig
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError

from nsa_lightning.data.storage import filesystem_of, is_url, open_binary, retried
from nsa_lightning.paths import expand_path

JSON_LINES = (".jsonl", ".ndjson")
COMPRESSION = 4  # bytes of text that a byte of a compressed file is taken for

log = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    """A file as it was found."""

    name: str  # absolute path, or URL
    size: int  # bytes
    version: str  # changes when the file is written: its time of modification, or what its server calls it


class Part(NamedTuple):
    """What is read of a file at a time: all of it, or some lines of a long jsonl or row groups of a long parquet."""

    name: str
    start: int  # first byte or row group: the lines that begin, the groups that lie
    stop: int | None  # before this one; None: the end
    size: int  # bytes of text, about


def find_files(sources: Sequence[str], include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[SourceFile]:
    """Find the files that `sources` name, `include` keeps and `exclude` does not drop: sorted, each once.

    Symbolic links are followed. A file that several names lead to is one file, under its own name if that is among
    them; the same holds for a directory, and a link to a directory that contains the link is not followed. A pattern
    that matches no file is logged as a warning.

    Args:
        sources: files, directories (every regular file below that is not hidden) and globs with `**`; paths, or URLs of
            fsspec such as s3://bucket/texts/, where `*` alone makes a glob. `~` is expanded, and `{stdlib}` stands for
            the directory of Python's standard library.
        include: globs of files, and of directories with all that is below; none keeps everything.
        exclude: the same for what to leave out. A relative glob matches at any depth below the source: below the
            directory that it names, or that stands before a glob's first wildcard.

    Raises:
        ValueError: a source matches no file, a pattern is malformed, a directory cannot be read, or nothing is left.
    """
    kept, dropped = _Globs("data.include", include), _Globs("data.exclude", exclude)
    found: dict[str, SourceFile] = {}
    names: set[str] = set()
    for source in sources:
        source = expand_path(source) if is_url(source) else source  # noqa: PLW2901
        root, files = _url_files(source) if is_url(source) else _local_files(source)
        if not files:
            raise SettingError(f"data.sources must match files, {source!r} matches none")
        names.update(file.name for file in files)
        for file in files:
            below = file.name.removeprefix(root.rstrip("/"))
            keep, drop = kept.match(file.name, below), dropped.match(file.name, below)
            if (keep or not include) and not drop:
                found[file.name] = file
    kept.warn_of_unmatched(len(names))
    dropped.warn_of_unmatched(len(names))
    if not found:
        raise SettingError(
            f"data.include={list(include)} and data.exclude={list(exclude)} leave none of the {len(names)} files of "
            f"{list(sources)}"
        )
    return [found[name] for name in _once(found)]


def parts_of(file: SourceFile, size: int) -> list[Part]:
    """Cut a file into parts of about `size` bytes of text, if its kind can be read from the middle."""
    kind = file_kind(file.name)
    whole = Part(file.name, 0, None, file.size)
    if kind.endswith(JSON_LINES) and file.size > size:
        bounds = [*range(0, file.size, size), file.size]
        return [Part(file.name, start, stop, stop - start) for start, stop in itertools.pairwise(bounds)]
    if not kind.endswith((".gz", ".zst", ".parquet")):
        return [whole]
    text_size = file.size * COMPRESSION
    return (
        _row_groups(file, size) if kind.endswith(".parquet") and text_size > size else [whole._replace(size=text_size)]
    )


def file_kind(name: str) -> str:
    """The last component of a path or URL, in lower case: its end tells how the file is read."""
    return PurePosixPath(name.partition("?")[0] if is_url(name) else name).name.lower()


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Say which file cannot be read."""
    try:
        yield
    except OSError as error:
        place = error.filename or name
        raise SettingError(f"data.sources: {place} cannot be read: {error.strerror or error}") from error


class _Globs:
    """Globs that are anchored at the root, and others that match at any depth below a source."""

    def __init__(self, setting: str, patterns: Sequence[str]) -> None:
        self._setting = setting
        self._unmatched = list(patterns)
        self._anchored: list[tuple[str, re.Pattern[str]]] = []
        self._relative: list[tuple[str, re.Pattern[str]]] = []
        for pattern in patterns:
            expanded = pattern if is_url(pattern) else _expand(pattern)
            try:
                regex = re.compile(_path_regex(expanded))
            except re.error as error:
                raise SettingError(f"{setting} must hold globs, {pattern!r} is malformed: {error.msg}") from error
            kind = self._anchored if expanded.startswith("/") or is_url(expanded) else self._relative
            kind.append((pattern, regex))

    def match(self, name: str, below: str) -> bool:
        """Whether one matches `name`, or `below`, which is what follows the source's root in it."""
        matched = [pattern for pattern, regex in self._anchored if regex.fullmatch(name)]
        matched += [pattern for pattern, regex in self._relative if regex.fullmatch(below)]
        if self._unmatched:
            self._unmatched = [pattern for pattern in self._unmatched if pattern not in matched]
        return bool(matched)

    def warn_of_unmatched(self, num_files: int) -> None:
        """Name the patterns that have matched nothing: what they were meant to keep or drop is not known here."""
        if self._unmatched:
            log.warning(
                "%s: %s %s none of the %d files of data.sources; a relative pattern is looked for below each source",
                self._setting,
                ", ".join(map(repr, self._unmatched)),
                "matches" if len(self._unmatched) == 1 else "match",
                num_files,
            )


def _expand(pattern: str) -> str:
    return str(Path(expand_path(pattern.replace("{stdlib}", sysconfig.get_path("stdlib")))))


def _path_regex(pattern: str) -> str:
    """A glob as a regular expression for the whole path of a file that it matches, or that lies below a match."""
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\])", pattern)
    body = "".join(
        rules.get(part) or (_set_regex(part) if index % 2 else re.escape(part)) for index, part in enumerate(parts)
    )
    return f"(?s:{'' if pattern.startswith('/') or is_url(pattern) else '.*/'}{body}(?:/.*)?)"


def _set_regex(characters: str) -> str:
    """A glob's `[a-z]` or `[!a-z]`, where all but `-` and `!` stands for itself."""
    negated = characters.startswith("[!")
    inner = re.sub(r"([\\\[\]^&~|])", r"\\\1", characters[2 if negated else 1 : -1])
    return f"(?!/)[{'^' if negated else ''}{inner}]"


def _once(names: Collection[str]) -> list[str]:
    """The names in order, of those that lead to the same file its own or the first one."""
    chosen: dict[str, str] = {}
    _real_folder.cache_clear()  # links may have changed since
    for name in sorted(names):
        real = name if is_url(name) else _real_path(name)
        if real not in chosen or name == real:
            chosen[real] = name
    return sorted(chosen.values())


def _real_path(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return os.path.realpath(name) if os.path.islink(name) else f"{_real_folder(folder)}/{base}"  # noqa: PTH114


@lru_cache(maxsize=2**16)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder or "/").rstrip("/")


def _local_files(source: str) -> tuple[str, list[SourceFile]]:
    """The files of a source, behind the directory that relative globs start from."""
    path = Path(os.path.abspath(_expand(source)))  # noqa: PTH100  (links stay: a link's name may tell the file's kind)
    with readable(str(path)):
        if not source:
            names: Iterator[str] = iter(())
        elif path.is_dir():
            names = _files_below(str(path))
        elif path.exists():
            names = iter([str(path)])
        else:
            names = _matches(path.parts)
        files = [file for name in names if (file := _local_file(name)) is not None]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    root = path if path.is_dir() else path.parent if len(fixed) == len(path.parts) else Path(*fixed)
    return str(root), files


def _local_file(name: str) -> SourceFile | None:
    try:
        status = os.stat(name)  # noqa: PTH116  (there may be millions)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a link into nowhere, or to itself
            return None
        raise
    return SourceFile(name, status.st_size, str(status.st_mtime_ns)) if stat.S_ISREG(status.st_mode) else None


def _matches(parts: Sequence[str]) -> Iterator[str]:
    """What the components of a glob match. Python's own `**` follows a link that leads back until the path is too long.

    Args:
        parts: of an absolute path; `**` stands for any number of directories.
    """
    fixed = list(itertools.takewhile(lambda part: part != "**", parts))
    rest = parts[len(fixed) + 1 :]
    found = glob.iglob(os.path.join(*fixed))  # noqa: PTH118, PTH207
    if len(fixed) == len(parts):
        yield from found
        return
    for start in found:
        if os.path.isdir(start):  # noqa: PTH112
            for folder, _ in _folders(start):
                yield from _matches([glob.escape(folder), *(rest or ["*"])])


def _files_below(directory: str) -> Iterator[str]:
    """Everything below `directory` that neither is hidden nor lies in a hidden directory."""
    for folder, names in _folders(directory):
        yield from (f"{folder.rstrip('/')}/{name}" for name in names)


def _folders(directory: str) -> Iterator[tuple[str, list[str]]]:
    """A directory and all below it that are not hidden, each once, with the names in it that are no directories.

    Links are followed after everything else, so that a directory that lies below keeps its own name. One that leads to
    a directory that contains it is not followed.
    """

    def stop(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    starts = deque([directory])
    while starts:
        for folder, subfolders, names in os.walk(starts.popleft(), onerror=stop):
            real = os.path.realpath(folder)
            subfolders[:] = [] if real in seen else sorted(name for name in subfolders if not name.startswith("."))
            if real not in seen:
                links = [name for name in subfolders if os.path.islink(f"{folder}/{name}")]  # noqa: PTH114
                starts.extend(f"{folder}/{name}" for name in links if not _leads_back(f"{real}/{name}"))
                yield folder, [name for name in names if not name.startswith(".")]
            seen.add(real)


def _leads_back(link: str) -> bool:
    return link.startswith(f"{os.path.realpath(link).rstrip('/')}/")


def _url_files(url: str) -> tuple[str, list[SourceFile]]:
    """The files of a URL, behind the directory that relative globs start from."""
    if "::" in url:
        raise SettingError(f"data.sources must not chain filesystems, got {url!r}")
    filesystem, path = filesystem_of(url)

    def look() -> tuple[str, dict[str, dict[str, Any]]]:
        if "*" in path:
            return path.partition("*")[0].rpartition("/")[0], sized(filesystem.glob(path, detail=True))
        if url.endswith("/") or filesystem.info(path)["type"] == "directory":
            below = filesystem.find(path, detail=True).items()
            return path, sized({name: info for name, info in below if "/." not in name.removeprefix(path.rstrip("/"))})
        return path.rpartition("/")[0], {path: filesystem.info(path)}

    def sized(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """A listing over http has no sizes."""
        return {name: filesystem.info(name) if info["size"] is None else info for name, info in found.items()}

    root, found = retried(f"data.sources: {url}", look)
    files = [
        SourceFile(filesystem.unstrip_protocol(name), info["size"] or 0, _version(info))
        for name, info in found.items()
        if info["type"] == "file"
    ]
    return filesystem.unstrip_protocol(root), files


def _version(info: dict[str, Any]) -> str:
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified", "created")
    return next((str(info[name]) for name in names if info.get(name)), "")


def _row_groups(file: SourceFile, size: int) -> list[Part]:
    """Neighbouring row groups together, up to about `size` bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with readable(file.name), open_binary(file.name) as stream:
            metadata = pq.read_metadata(stream)
    except pa.ArrowException as error:
        raise SettingError(f"data.sources: {file.name} is not a whole parquet file: {error}") from error
    parts = [Part(file.name, 0, 0, 0)]
    for group in range(metadata.num_row_groups):
        last, more = parts[-1], metadata.row_group(group).total_byte_size
        if last.size and last.size + more > size:
            parts.append(Part(file.name, group, group + 1, more))
        else:
            parts[-1] = Part(file.name, last.start, group + 1, last.size + more)
    return parts
