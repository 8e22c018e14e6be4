"""Records of the user's files, one JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError


def read_records(path: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record behind where it stands, `path:line`; empty lines are skipped.

    Raises:
        ValueError: the file cannot be read, has no records, or a line is none; `setting` is what the user calls it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"{setting} must be a readable jsonl file, got {path}: {error}") from error
    yield from parse_records(text, str(path), setting)


def parse_records(text: str, name: str, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`read_records` of a text that was read."""
    empty = True
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place, empty = f"{name}:{number}", False
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SettingError(f"{setting}: {place} is not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise SettingError(f"{setting}: {place} is not a JSON object, got {line:.60}")
        yield place, record
    if empty:
        raise SettingError(f"{setting} must hold records, {name} has none")


def text_of(record: dict[str, Any], field: str, place: str, setting: str) -> str:
    """A field that must hold text.

    Raises:
        ValueError: it does not.
    """
    value = record.get(field)
    if not isinstance(value, str) or not value:
        raise SettingError(f'{setting}: {place} must hold a text as "{field}", it has {list(record)}')
    return value
