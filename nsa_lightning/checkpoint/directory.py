"""Hugging Face directories of ours: weights, config.json, the tokenizer's files, and how they come to be whole."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from nsa_kernels.errors import SettingError
from safetensors import SafetensorError

from nsa_lightning.checkpoint.dense import SavedModel, dense_settings, read_dense_config, read_json, shared_settings
from nsa_lightning.model.transformer import TransformerConfig

MODEL_TYPE = "nsa_lightning"
SHARD_BYTES = 2 * 10**9
_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
_REMOTE_CODE = '''"""Where `from_pretrained(..., trust_remote_code=True)` finds the model: in nsa-lightning."""

from nsa_lightning.checkpoint.hugging_face_model import NSAConfig, NSAForCausalLM

__all__ = ["NSAConfig", "NSAForCausalLM"]
'''


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """A directory to write into that gets the name `output` at the end: it appears whole, or not at all.

    Raises:
        ValueError: `output` exists, or the disk does not take what is written.
    """
    if output.exists():
        raise SettingError(f"output must not exist, got {output}")
    temporary = output.with_name(f"{output.name}.tmp-{uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(output)
    except (OSError, SafetensorError) as error:
        exists = isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
        reason = "another process made it meanwhile" if exists and output.exists() else str(error)
        raise SettingError(f"output={output} cannot be written: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_config(
    directory: Path, config: TransformerConfig, max_seq_len: int, dtype: str, tokenizer: Path | None = None
) -> str:
    """Write the config.json: of a dense family where one computes the same, else of ours, with the class to load it.

    Args:
        directory: of the model.
        config: of the decoder.
        max_seq_len: the context it is made for, tokens.
        dtype: of the weights, as torch names it.
        tokenizer: a directory whose config.json knows the ids of special tokens.

    Returns:
        The model_type.
    """
    special = tokenizer / "config.json" if tokenizer is not None else None
    known = read_json(special, "tokenizer") if special is not None and special.is_file() else {}
    settings = shared_settings(config) | {"max_position_embeddings": max_seq_len, "dtype": dtype, "torch_dtype": dtype}
    settings |= {name: known[name] for name in _SPECIAL_TOKENS if known.get(name) is not None}
    settings |= dense_settings(config) or {
        "architectures": ["NSAForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": "modeling_nsa.NSAConfig", "AutoModelForCausalLM": "modeling_nsa.NSAForCausalLM"},
        "transformer": asdict(config),
    }
    if settings["model_type"] == MODEL_TYPE:
        (directory / "modeling_nsa.py").write_text(_REMOTE_CODE)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return str(settings["model_type"])


def read_config(directory: Path, setting: str) -> SavedModel:
    """Read a config.json of ours or of a dense family.

    Raises:
        ValueError: it is another model's, or its settings are broken.
    """
    settings = read_json(directory / "config.json", setting)
    if settings.get("model_type") != MODEL_TYPE:
        return read_dense_config(directory, setting)
    missing = [name for name in ("transformer", "max_position_embeddings") if name not in settings]
    if missing:
        raise SettingError(f"{setting}: {directory / 'config.json'} must give {', '.join(missing)}")
    return SavedModel(transformer_config(settings["transformer"], setting), settings["max_position_embeddings"])


def transformer_config(settings: Any, setting: str) -> TransformerConfig:
    """The decoder's config that was saved with a model.

    Raises:
        ValueError: it is broken.
    """
    try:
        return TransformerConfig.from_dict(settings)
    except (TypeError, KeyError) as error:
        raise SettingError(f"{setting}: its saved settings of model.transformer are broken: {error!r}") from error


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files of a directory, or a `tokenizer.json` alone; returns their names."""
    if source.is_file():
        shutil.copyfile(source, target / "tokenizer.json")
        (target / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
        return ["tokenizer.json"]
    files = sorted({path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()})
    for path in files:
        shutil.copyfile(path, target / path.name)
    return [path.name for path in files]
