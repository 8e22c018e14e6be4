"""Files to documents: text and code, jsonl and parquet, one document in memory at a time."""

import glob
import gzip
import hashlib
import itertools
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

SPLITS = ("train", "val", "test")


class Document(NamedTuple):
    """One text and where it stands."""

    name: str  # path, path:line of a jsonl file, path:row of a parquet file
    text: str


def resolve_files(sources: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """Find the files that `sources` name and `exclude` does not: absolute, sorted, each once.

    Args:
        sources: files, directories (every regular file below that is not hidden) and globs with `**`. `~` is expanded,
            and `{stdlib}` stands for the directory of Python's standard library.
        exclude: globs of files, and of directories with all that is below. A relative one matches at any depth below
            the source: below the directory that it names, or that stands before a glob's first wildcard.

    Raises:
        ValueError: a source matches no file, a directory cannot be read, or nothing is left.
    """
    patterns = [_expand(pattern) for pattern in exclude]
    unwanted = re.compile("|".join(_path_regex(p) for p in patterns if p.startswith("/")) or "(?!)")
    unwanted_below = re.compile("|".join(_path_regex(p) for p in patterns if not p.startswith("/")) or "(?!)")
    found: set[Path] = set()
    kept: set[Path] = set()
    for root, path in (match for source in sources for match in _files_of(source)):
        found.add(path)
        if not unwanted.fullmatch(str(path)) and not unwanted_below.fullmatch(f"/{path.relative_to(root)}"):
            kept.add(path)
    if not kept:
        raise ValueError(f"data.exclude={list(exclude)} leaves none of the {len(found)} files of {list(sources)}")
    return sorted(kept)


def iter_documents(files: Iterable[Path], text_field: str) -> Iterator[Document]:
    """Read the documents of `files` in order, empty ones too: who stores them counts and skips those.

    A `.jsonl` line or a `.parquet` row is one document, its `text_field`; any other file is one document. Text and
    jsonl may be compressed (`.gz`).

    Raises:
        ValueError: a file cannot be read or decoded, or has no such field.
    """
    for path in files:
        kind = path.name.lower().removesuffix(".gz")
        if kind.endswith(".jsonl"):
            yield from _read_jsonl(path, text_field)
        elif kind.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
        else:
            yield Document(str(path), _read_text(path))


def fingerprint_files(files: Sequence[Path], text_field: str) -> str:
    """Hash what the documents depend on: each file's content and its name below the files' common directory."""
    root = os.path.commonpath([path.parent for path in files])
    digest = hashlib.blake2b(text_field.encode(), digest_size=16)
    for path in files:
        with _readable(path), path.open("rb") as stream:
            content = hashlib.file_digest(stream, "blake2b").digest()
        digest.update(b"\0" + os.fsencode(os.path.relpath(path, root)) + b"\0" + content)
    return digest.hexdigest()


def text_bytes(files: Sequence[Path]) -> int | None:
    """The bytes of all documents, known before reading only if every file is plain text."""
    if any(path.suffix.lower() in {".gz", ".jsonl", ".parquet"} for path in files):
        return None
    return sum(path.stat().st_size for path in files)


def text_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: equal texts meet in one split, whatever their names."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 11) / 2**53


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """The split of a document: the same in any run and any worker."""
    fraction = text_fraction(text)
    if fraction < test_fraction:
        return "test"
    return "val" if fraction < test_fraction + val_fraction else "train"


def _expand(pattern: str) -> str:
    return str(Path(pattern.replace("{stdlib}", sysconfig.get_path("stdlib"))).expanduser())


def _path_regex(pattern: str) -> str:
    """A glob as a regular expression for the whole path of a file that it matches, or that lies below a match."""
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    sets = {part: re.sub(r"^\[!", "[^", part) for part in parts if re.fullmatch(r"\[[^]]+\]", part)}
    body = "".join(rules.get(part) or sets.get(part) or re.escape(part) for part in parts)
    return f"{'' if pattern.startswith('/') else '.*/'}{body}(?:/.*)?"


def _files_of(source: str) -> list[tuple[Path, Path]]:
    """The files of a source, each behind the directory that relative patterns of `exclude` start from."""
    path = Path(os.path.abspath(_expand(source)))  # noqa: PTH100  (links stay: a link's name may tell the file's kind)
    with _readable(path):
        if not source:
            files = []
        elif path.is_dir():
            files = list(_walk(path))
        elif path.is_file():
            files = [path]
        else:
            files = [match for match in map(Path, glob.glob(str(path), recursive=True)) if match.is_file()]  # noqa: PTH207
    if not files:
        raise ValueError(f"data.sources must match files, {source!r} matches none")
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    root = path if path.is_dir() else path.parent if len(fixed) == len(path.parts) else Path(*fixed)
    return [(root, file) for file in files]


def _walk(directory: Path) -> Iterator[Path]:
    """Every regular file below `directory` that neither is hidden nor lies in a hidden directory."""

    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(directory, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"data.sources: {path} is not a whole gzip file: {error}") from error
    except OSError as error:
        place = error.filename or path
        raise ValueError(f"data.sources: {place} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _read_text(path: Path) -> str:
    with _readable(path), _open(path) as stream:
        raw = stream.read()
    try:
        if b"\0" in raw:
            raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), raw.index(b"\0") + 1, "NUL")
        return raw.decode()
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is not UTF-8 text: {reason}; leave it out with data.exclude") from error


def _read_jsonl(path: Path, text_field: str) -> Iterator[Document]:
    with _readable(path), _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Document(f"{path}:{number}", _json_text(line, f"{path}:{number}", text_field))


def _json_text(line: bytes, place: str, text_field: str) -> str:
    try:
        record = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"{place} is not a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place} is not a JSON object, got {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"data.text_field={text_field!r} is not a field of {place}, which has {list(record)}")
    text = record[text_field]
    if not isinstance(text, str | None):
        raise ValueError(f"data.text_field={text_field!r} must hold text, {place} holds {type(text).__name__}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not Unicode text: {error.reason} at character {error.start}") from error
    return text or ""


def _read_parquet(path: Path, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with _readable(path), pq.ParquetFile(path, pre_buffer=False) as table:
            columns = {column.name: column.type for column in table.schema_arrow}
            if text_field not in columns:
                raise ValueError(f"data.text_field={text_field!r} is not a column of {path}, which has {list(columns)}")
            kind = columns[text_field]
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ValueError(f"data.text_field={text_field!r} must hold text, {path} holds {kind}")
            for batch in table.iter_batches(batch_size=64, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{path}:{row}", text or "")
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"data.sources: {path} is not a whole parquet file (row {row}): {error}") from error
