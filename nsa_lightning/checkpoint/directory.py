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

from nsa_lightning.checkpoint.dense import (
    SavedModel,
    as_loaded,
    dense_settings,
    read_dense_config,
    read_json,
    shared_settings,
)
from nsa_lightning.model.config import TransformerConfig

MODEL_TYPE = "nsa_lightning"
SHARD_BYTES = 2 * 10**9
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


def write_config(directory: Path, config: TransformerConfig, dtype: str, special_tokens: dict[str, Any]) -> str:
    """Write the config.json: of a dense family where one computes the same, else of ours, with the class to load it.

    Args:
        directory: of the model.
        config: of the decoder, with its context_length.
        dtype: of the weights, as torch names it.
        special_tokens: their ids, as a config.json names them.

    Returns:
        The model_type.
    """
    assert config.context_length is not None
    settings = shared_settings(config) | special_tokens
    settings |= {"max_position_embeddings": config.context_length, "dtype": dtype, "torch_dtype": dtype}
    settings |= dense_settings(config) or {
        "architectures": ["NSAForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": "modeling_nsa.NSAConfig", "AutoModelForCausalLM": "modeling_nsa.NSAForCausalLM"},
        "transformer": asdict(config),
    }
    if settings["model_type"] == MODEL_TYPE:
        write_remote_code(directory)
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return str(settings["model_type"])


def write_remote_code(directory: Path) -> None:
    """Write what `from_pretrained(..., trust_remote_code=True)` finds our class by."""
    (directory / "modeling_nsa.py").write_text(_REMOTE_CODE)


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
    config = transformer_config(settings["transformer"], setting)
    return as_loaded(config, settings["max_position_embeddings"], directory, setting)


def transformer_config(settings: Any, setting: str) -> TransformerConfig:
    """The decoder's config that was saved with a model.

    Raises:
        ValueError: it is broken.
    """
    try:
        return TransformerConfig.from_dict(settings)
    except (TypeError, KeyError) as error:
        raise SettingError(f"{setting}: its saved settings of model.transformer are broken: {error!r}") from error
