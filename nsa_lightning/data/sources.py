"""What `data.sources` stand for: files on disk and behind URLs, and the parts they are read in."""

import glob
import itertools
import os
import re
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError

from nsa_lightning.data.storage import filesystem_of, is_url, open_binary, retried
from nsa_lightning.paths import expand_path

COMPRESSION = 4  # bytes of text that a byte of a compressed file is taken for


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

    Args:
        sources: files, directories (every regular file below that is not hidden) and globs with `**`; paths, or URLs of
            fsspec such as s3://bucket/texts/, where `*` alone makes a glob. `~` is expanded, and `{stdlib}` stands for
            the directory of Python's standard library.
        include: globs of files, and of directories with all that is below; none keeps everything.
        exclude: the same for what to leave out. A relative glob matches at any depth below the source: below the
            directory that it names, or that stands before a glob's first wildcard.

    Raises:
        ValueError: a source matches no file, a directory cannot be read, or nothing is left.
    """
    kept, dropped = _Globs(include), _Globs(exclude)
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
            if (not include or kept.match(file.name, below)) and not dropped.match(file.name, below):
                found[file.name] = file
    if not found:
        raise SettingError(
            f"data.include={list(include)} and data.exclude={list(exclude)} leave none of the {len(names)} files of "
            f"{list(sources)}"
        )
    return [found[name] for name in sorted(found)]


def parts_of(file: SourceFile, size: int) -> list[Part]:
    """Cut a file into parts of about `size` bytes of text, if its kind can be read from the middle."""
    kind = file_kind(file.name)
    whole = Part(file.name, 0, None, file.size)
    if kind.endswith(".jsonl") and file.size > size:
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

    def __init__(self, patterns: Sequence[str]) -> None:
        expanded = [pattern if is_url(pattern) else _expand(pattern) for pattern in patterns]
        anchored = [pattern for pattern in expanded if pattern.startswith("/") or is_url(pattern)]
        self._whole = _any_of(anchored)
        self._below = _any_of([pattern for pattern in expanded if pattern not in anchored])

    def match(self, name: str, below: str) -> bool:
        """Whether one matches `name`, or `below`, which is what follows the source's root in it."""
        return bool(self._whole.fullmatch(name) or self._below.fullmatch(below))


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(_path_regex, patterns)) or "(?!)")


def _expand(pattern: str) -> str:
    return str(Path(expand_path(pattern.replace("{stdlib}", sysconfig.get_path("stdlib")))))


def _path_regex(pattern: str) -> str:
    """A glob as a regular expression for the whole path of a file that it matches, or that lies below a match."""
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    sets = {part: re.sub(r"^\[!", "[^", part) for part in parts if re.fullmatch(r"\[[^]]+\]", part)}
    body = "".join(rules.get(part) or sets.get(part) or re.escape(part) for part in parts)
    return f"{'' if pattern.startswith('/') or is_url(pattern) else '.*/'}{body}(?:/.*)?"


def _local_files(source: str) -> tuple[str, list[SourceFile]]:
    """The files of a source, behind the directory that relative globs start from."""
    path = Path(os.path.abspath(_expand(source)))  # noqa: PTH100  (links stay: a link's name may tell the file's kind)
    with readable(str(path)):
        if not source:
            names: Iterator[str] = iter(())
        elif path.is_dir():
            names = _walk(path)
        elif path.exists():
            names = iter([str(path)])
        else:
            names = glob.iglob(str(path), recursive=True)  # noqa: PTH207
        files = [file for name in names if (file := _local_file(name)) is not None]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    root = path if path.is_dir() else path.parent if len(fixed) == len(path.parts) else Path(*fixed)
    return str(root), files


def _local_file(name: str) -> SourceFile | None:
    try:
        status = os.stat(name)  # noqa: PTH116  (there may be millions)
    except FileNotFoundError:  # a link into nowhere
        return None
    return SourceFile(name, status.st_size, str(status.st_mtime_ns)) if stat.S_ISREG(status.st_mode) else None


def _walk(directory: Path) -> Iterator[str]:
    """Everything below `directory` that neither is hidden nor lies in a hidden directory."""

    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(directory, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (f"{folder}/{name}" for name in names if not name.startswith("."))


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
