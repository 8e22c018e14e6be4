"""What the files beside a tokenizer.json call its special tokens, read as `transformers` reads them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError

SETTINGS = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
END_OF_TEXT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
"""Where the end of a text is looked for, in this order, if no file names it."""

_MAP = "special_tokens_map.json"
_MODEL_FILES = ("generation_config.json", "config.json")


def special_token_names(directory: Path) -> dict[str, str]:
    """The special tokens of a directory by what they are for, such as `eos_token`.

    Raises:
        ValueError: a file is no JSON object.
    """
    settings = read_settings(directory / SETTINGS)
    # transformers reads the older file no more where the newer one lists its tokens
    older = {} if "added_tokens_decoder" in settings else read_settings(directory / _MAP)
    own = {name: token for name, token in settings.items() if name.endswith("_token") and isinstance(token, str)}
    more = settings.get("extra_special_tokens")
    own |= more if isinstance(more, dict) else {}
    given = {name: _content(token) for name, token in own.items()}
    given |= {name: _content(older.get(name, settings.get(name))) for name in NAMES}
    return {name: token for name, token in given.items() if token is not None}


def end_of_text_ids(directory: Path) -> list[int]:
    """The tokens at which a model's settings end a text, those for generation first.

    Raises:
        ValueError: a file is no JSON object.
    """
    found: list[int] = []
    for file in _MODEL_FILES:
        given = read_settings(directory / file).get("eos_token_id")
        found += [token for token in (given if isinstance(given, list) else [given]) if type(token) is int]
    return list(dict.fromkeys(found))


def find_end_of_text(vocab: Mapping[str, int], added: Mapping[int, str], directory: Path | None) -> str | None:
    """The token that ends a text: what the files beside the tokenizer name, else the first usual name that it knows.

    Args:
        vocab: every token's id.
        added: tokens that are no piece of a text, by id; a model's settings may name one of them.
        directory: of the tokenizer's files.

    Returns:
        A name in `vocab`, or None where there is none.

    Raises:
        ValueError: a file is no JSON object.
    """
    return next((name for name in _candidates(added, directory) if name in vocab), None)


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} must be readable JSON: {error}") from error
    if not isinstance(settings, dict):
        raise SettingError(f"{path} must hold an object, got {type(settings).__name__}")
    return settings


def _candidates(added: Mapping[int, str], directory: Path | None) -> Iterator[str]:
    if directory is not None:
        yield from filter(None, [special_token_names(directory).get("eos_token")])
        yield from (added[token] for token in end_of_text_ids(directory) if token in added)
    yield from END_OF_TEXT_NAMES


def _content(token: Any) -> str | None:
    """The text of a special token, which may be saved with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
