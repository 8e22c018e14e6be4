"""Files to documents: text and code, json, jsonl and parquet, one document or json file in memory at a time."""

import codecs
import gzip
import hashlib
import io
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple, cast

from nsa_kernels.errors import SettingError

from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.sources import JSON_LINES, Part, file_kind, readable
from nsa_lightning.data.storage import open_binary

log = logging.getLogger(__name__)


class Document(NamedTuple):
    """One text and where it stands."""

    name: str  # path or URL, path:line of a jsonl file, path:row of a parquet file, path[index] of a json array
    text: str


def iter_documents(parts: Iterable[Part], settings: TextSettings) -> Iterator[Document]:
    """Read the documents of `parts` in order, empty ones too: who stores them counts and skips those.

    A `.jsonl` or `.ndjson` line or a `.parquet` row is one document, its `text_field`; so is each record of a `.json`
    file that holds one, an array or lines of them. Any other file is one document. All but parquet may be compressed
    (`.gz`, `.zst`). With `skip_binary` a file that is no UTF-8 text is an empty document.

    Raises:
        ValueError: a file cannot be read or decoded, or has no such field.
    """
    text_field, skip_binary = settings.text_field, settings.skip_binary
    for part in parts:
        kind = file_kind(part.name).removesuffix(".gz").removesuffix(".zst")
        if kind.endswith(JSON_LINES):
            yield from _read_jsonl(part, text_field)
        elif kind.endswith(".json"):
            yield from _read_json(part.name, text_field, skip_binary)
        elif kind.endswith(".parquet"):
            yield from _read_parquet(part, text_field)
        else:
            yield Document(part.name, _read_text(part.name, skip_binary))


class PartRead(NamedTuple):
    """A part of which all documents were read."""

    part: Part
    digest: str  # of their texts


def read_parts(parts: Iterable[Part], settings: TextSettings, read: Callable[[PartRead], None]) -> Iterator[Document]:
    """Read documents as `iter_documents` does, and tell `read` of each part that is done."""
    for part in parts:
        digest = hashlib.blake2b(digest_size=16)
        for document in iter_documents([part], settings):
            text = document.text.encode()
            digest.update(len(text).to_bytes(8))
            digest.update(text)
            yield document
        read(PartRead(part, digest.hexdigest()))


def holds_still(found: PartRead, settings: TextSettings) -> bool:
    """Whether a part has the documents that were read of it once."""
    again: list[PartRead] = []
    try:
        for _ in read_parts([found.part], settings, again.append):
            pass
    except SettingError:
        return False
    return again == [found]


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed."""
    kind = file_kind(name)
    with readable(name), open_binary(name) as raw:
        if kind.endswith(".gz"):
            try:
                with gzip.open(raw) as stream:
                    yield cast(BinaryIO, stream)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise SettingError(f"data.sources: {name} is not a whole gzip file: {error}") from error
        elif kind.endswith(".zst"):
            import pyarrow as pa

            frames = pa.CompressedInputStream(pa.PythonFile(cast(Any, raw), "r"), "zstd")
            with io.BufferedReader(cast(Any, frames), 2**20) as stream:
                yield cast(BinaryIO, stream)
        else:
            yield raw


def _read_text(name: str, skip_binary: bool) -> str:
    with _opened(name) as stream:
        raw = stream.read()
    try:
        if b"\0" in raw:
            raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), raw.index(b"\0") + 1, "NUL")
        return raw.decode()
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        if not skip_binary:
            raise SettingError(
                f"{name} is not UTF-8 text: {reason}; leave it out with data.exclude or data.skip_binary"
            ) from error
        log.warning("%s is left out, it is not UTF-8 text: %s", name, reason)
        return ""


def _read_jsonl(part: Part, text_field: str) -> Iterator[Document]:
    """The lines that begin in the part; those of a file's middle are named by their first byte."""
    with _opened(part.name) as stream:
        position = 0
        if part.start > 0:
            stream.seek(part.start - 1)
            position = part.start - 1 + len(stream.readline())
        for number, line in enumerate(stream, start=1):
            if part.stop is not None and position >= part.stop:
                return
            if line.removeprefix(codecs.BOM_UTF8).strip():
                name = f"{part.name}:{number}" if part.start == 0 else f"{part.name} at byte {position}"
                yield Document(name, _json_text(line, name, text_field))
            position += len(line)


def _read_json(name: str, text_field: str, skip_binary: bool) -> Iterator[Document]:
    """The records of a file, or its text if it holds none: code has `.json` files of every other kind."""
    text = _read_text(name, skip_binary)
    content = text.removeprefix("\ufeff")
    try:
        value = _parse_json(content, text_field)
    except _JSONError:  # as one value
        yield from _read_json_lines(name, text, content, text_field)
        return
    if _is_record(value, text_field):
        yield Document(name, _text_of(value, name, text_field))
    elif isinstance(value, list) and value and all(isinstance(record, dict) for record in value):
        if not any(text_field in record for record in value):
            message = "%s is an array of records without data.text_field=%r and is read as one text"
            log.warning(message, name, text_field)
            yield Document(name, text)
            return
        for index, record in enumerate(value):
            place = f"{name}[{index}]"
            yield Document(place, _text_of(record, place, text_field))
    else:
        yield Document(name, text)


def _read_json_lines(name: str, text: str, content: str, text_field: str) -> Iterator[Document]:
    """Lines of records, as many data sets have them under the name `.json`; any other content is one text."""
    lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
    try:
        is_lines = bool(lines) and _is_record(_parse_json(lines[0][1], text_field), text_field)
    except _JSONError:
        is_lines = False
    if not is_lines:
        yield Document(name, text)
        return
    for number, line in lines:
        place = f"{name}:{number}"
        yield Document(place, _json_text(line.encode(), place, text_field))


class _JSONError(ValueError):
    """A text is no JSON value, or none that can be read."""


def _parse_json(text: str, text_field: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if [name for name, _ in pairs].count(text_field) > 1:
            raise _JSONError(f"the field {text_field!r} stands twice in it")
        return dict(pairs)

    # A hook costs a call for each object: asked for only where the field's name comes twice.
    twice = text.count(json.dumps(text_field, ensure_ascii=False)) > 1
    try:
        return json.loads(text, object_pairs_hook=unique if twice else None)
    except RecursionError as error:
        raise _JSONError("it is nested too deeply") from error
    except ValueError as error:
        raise _JSONError(str(error)) from error


def _is_record(value: Any, text_field: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(text_field), str)


def _json_text(line: bytes, place: str, text_field: str) -> str:
    try:
        record = _parse_json(line.removeprefix(codecs.BOM_UTF8).decode(), text_field)
    except (_JSONError, UnicodeDecodeError) as error:
        raise SettingError(f"{place} is not a JSON object: {error}") from error
    return _text_of(record, place, text_field)


def _text_of(record: Any, place: str, text_field: str) -> str:
    if not isinstance(record, dict):
        raise SettingError(f"{place} is not a JSON object, got {type(record).__name__}")
    if text_field not in record:
        raise SettingError(f"data.text_field={text_field!r} is not a field of {place}, which has {list(record)}")
    text = record[text_field]
    if not isinstance(text, str | None):
        raise SettingError(f"data.text_field={text_field!r} must hold text, {place} holds {type(text).__name__}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise SettingError(f"{place} is not Unicode text: {error.reason} at character {error.start}") from error
    return text or ""


def _read_parquet(part: Part, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, row = part.name, 0
    try:
        with _opened(name) as stream, pq.ParquetFile(stream, pre_buffer=False) as table:
            columns = {column.name: column.type for column in table.schema_arrow}
            if text_field not in columns:
                raise SettingError(
                    f"data.text_field={text_field!r} is not a column of {name}, which has {list(columns)}"
                )
            kind = columns[text_field]
            if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
                raise SettingError(f"data.text_field={text_field!r} must hold text, {name} holds {kind}")
            groups = range(table.num_row_groups)[part.start : part.stop]
            row = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
            for batch in table.iter_batches(batch_size=64, row_groups=list(groups), columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{name}:{row}", text or "")
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SettingError(f"data.sources: {name} is not a whole parquet file (row {row}): {error}") from error


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
