"""Prompts from the command line, from files or from a pipe."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from nsa_kernels.errors import SettingError


class Prompt(NamedTuple):
    """A text to continue, and what the user knows it by."""

    name: str  # prompt, stdin, a file's path, path:line of a jsonl file
    text: str


def read_prompts(prompt: str | None, files: Sequence[str], stdin: BinaryIO) -> list[Prompt]:
    """The prompt, those of the files in their order, or what is piped in where there are neither.

    A file is one prompt, a `.jsonl` file one a line, its `prompt`. The line break at the end of a file is none of it.

    Raises:
        ValueError: there is no prompt, one is empty or not Unicode, or a file cannot be read.
    """
    if prompt is not None and files:
        raise SettingError("prompt and prompt_file must not both be given")
    if prompt is not None:
        prompts = [Prompt("prompt", prompt)]
    elif files:
        prompts = [found for file in files for found in _read_file(Path(file))]
    elif stdin.isatty():
        raise SettingError("prompt or prompt_file must be given where nothing is piped in, got neither")
    else:
        prompts = [Prompt("stdin", _decode("stdin", stdin.read()).removesuffix("\n"))]
    if not prompts:
        raise SettingError(f"prompt_file must hold prompts, {', '.join(files)} has none")
    for name, text in prompts:
        if not text:
            raise SettingError(f"a prompt must not be empty, got an empty one from {name}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SettingError(f"a prompt must be Unicode text, {name} is not: {error.reason}") from error
    return prompts


def _read_file(path: Path) -> Iterator[Prompt]:
    try:
        text = _decode(str(path), path.read_bytes())
    except OSError as error:
        raise SettingError(f"prompt_file must be a readable file, got {path}: {error.strerror}") from error
    if path.suffix != ".jsonl":
        yield Prompt(str(path), text.removesuffix("\n"))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Prompt(f"{path}:{number}", _read_line(line, f"{path}:{number}"))


def _read_line(line: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise SettingError(f"prompt_file: {place} is not a JSON object: {error}") from error
    text = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise SettingError(f'prompt_file: {place} must be an object with a text as "prompt", got {line:.60}')
    return text


def _decode(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingError(
            f"a prompt must be UTF-8 text, {name} is not: {error.reason} at byte {error.start}"
        ) from error
