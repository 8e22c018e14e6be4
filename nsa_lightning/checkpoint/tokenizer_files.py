"""The files of a tokenizer beside a model, and what `transformers` needs of them to stop and to pad."""

import json
import shutil
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError

from nsa_lightning.data.token_names import SETTINGS, end_of_text_ids, read_settings, special_token_names
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer, vocab_size_of

TOKENIZER = "tokenizer.json"
_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
_GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


def check_tokenizer(place: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that knows more tokens than a model; one that is not there is none.

    Args:
        place: a `tokenizer.json`, or a directory that may have one.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: it has more tokens, or is broken.
    """
    if place.is_dir() and not (place / TOKENIZER).is_file():
        return
    found = vocab_size_of(str(place))
    if found > vocab_size:
        raise SettingError(f"tokenizer must have at most the {vocab_size} tokens of the model, got {found} in {place}")


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files of a directory, or a `tokenizer.json` and those beside it; returns their names."""
    directory = source if source.is_dir() else source.parent
    complete = source.is_dir() or source.name == TOKENIZER
    files = {path for pattern in _FILES for path in directory.glob(pattern) if path.is_file()} if complete else set()
    copies = {str(path.relative_to(directory)): path for path in files}
    copies |= {TOKENIZER: source} if source.is_file() else {}
    for name, path in copies.items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)
    return sorted(copies)


def special_token_ids(directory: Path) -> dict[str, Any]:
    """The ids of special tokens that a config.json knows, as it gives them; none without the file.

    Raises:
        ValueError: it is no JSON object.
    """
    known = read_settings(directory / "config.json")
    return {name: known[name] for name in _IDS if known.get(name) is not None}


def complete_tokenizer(source: Path, target: Path) -> dict[str, Any]:
    """Name the end of text and a token to pad with in copied files that do not, as `nsa generate` finds the end.

    Args:
        source: what was copied: a `tokenizer.json` or a directory.
        target: with the copies.

    Returns:
        The ids of special tokens for a config.json.

    Raises:
        ValueError: a file is broken.
    """
    directory = source if source.is_dir() else source.parent
    ids, ends = special_token_ids(directory), end_of_text_ids(directory)
    tokenizer = _open(source)
    if tokenizer is not None:
        ends = list(dict.fromkeys([*ends, tokenizer.end_of_text_id]))
        names = special_token_names(target)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | read_settings(target / SETTINGS)
        settings["eos_token"] = names.get("eos_token") or tokenizer.end_of_text
        padding = tokenizer.special_tokens.get(ids.get("pad_token_id", -1))
        settings["pad_token"] = names.get("pad_token") or padding or settings["eos_token"]
        _write(target / SETTINGS, settings | {name: token for name, token in names.items() if name not in settings})
        ids.setdefault("pad_token_id", tokenizer.token_id(settings["pad_token"]))
    if ends:
        ids.setdefault("eos_token_id", ends if len(ends) > 1 else ends[0])
        named = {"eos_token_id": ends if len(ends) > 1 else ends[0]}
        named |= {name: ids[name] for name in ("bos_token_id", "pad_token_id") if ids.get(name) is not None}
        _write(
            target / _GENERATION, named | read_settings(target / _GENERATION) | {"eos_token_id": named["eos_token_id"]}
        )
    return {name: token for name, token in ids.items() if token is not None}


def _open(source: Path) -> Tokenizer | None:
    """The tokenizer, or None where there is none or it has no end of a text."""
    if source.is_dir() and not (source / TOKENIZER).is_file():
        return None
    try:
        return load_tokenizer(str(source))
    except SettingError:
        return None


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
