"""A trained model on disk, whatever wrote it: its settings, its tensors by name and where its tokenizer is."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.checkpoint.directory import read_config, transformer_config
from nsa_lightning.checkpoint.find import find_last
from nsa_lightning.checkpoint.run_files import KEY, TOKENIZER, directory_of_run, unpack
from nsa_lightning.checkpoint.sharded import META, read_weights
from nsa_lightning.checkpoint.summary import check_same_sizes, read_summary
from nsa_lightning.checkpoint.weights import WeightFiles
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer


class Trained(NamedTuple):
    """A model whose weights can be read."""

    config: TransformerConfig
    max_seq_len: int  # tokens of the context it is made for
    read: Callable[[str], Tensor]  # a tensor by its name in a Hugging Face directory
    tokenizer: Path | None  # where its tokenizer's files are
    remark: str | None = None  # what its files say otherwise, or which was found
    unpacked: TemporaryDirectory[str] | None = None  # of the tokenizer, where the checkpoint has it inside


def open_trained(path: Path, setting: str) -> Trained:
    """Open a checkpoint of `nsa fit` or a directory of ours or of a dense family; `setting` is what the user calls it.

    Of a run's directory it is the last whole checkpoint.

    Raises:
        ValueError: it is none of them, incomplete, or its weights do not fit its settings.
    """
    if (path / "config.json").is_file():
        return _open_directory(path, setting)
    found = _last_of_run(path, setting) if path.is_dir() and not (path / META).is_file() else path
    opened = _open_checkpoint(found, setting)
    return opened if found == path else opened._replace(remark=f"{setting} is {found}")


def _last_of_run(directory: Path, setting: str) -> Path:
    """The complete checkpoint that was written last: below `runs/name`, one of its versions or one of checkpoints."""
    found = find_last(directory, setting=setting)
    if found is None:
        raise SettingError(
            f"{setting} must be a checkpoint of nsa fit, a run's directory, or one of nsa convert, nsa export or a "
            f"dense model, got the directory {directory}, which has neither config.json nor a whole checkpoint"
        )
    return found


def _open_directory(path: Path, setting: str) -> Trained:
    """A directory of `nsa convert` or `nsa export`, or a dense one, as it is."""
    config, max_seq_len, remark = read_config(path, setting)
    weights = WeightFiles(path, setting)
    with torch.device("meta"):
        model = Transformer(config)
    weights.check(model)
    return Trained(config, max_seq_len, weights.read, path, remark)


def _open_checkpoint(path: Path, setting: str) -> Trained:
    """A checkpoint of `nsa fit`, one file or a sharded directory; its run or itself has a tokenizer.json."""
    kinds = f"{setting} must be a checkpoint of nsa fit or a directory of nsa convert, nsa export or a dense model"
    if not path.exists():
        raise SettingError(f"{kinds}, got {path}, which does not exist")
    summary = read_summary(path, setting)
    settings = summary.get("hyper_parameters", {}).get("transformer")
    config = transformer_config(settings, f"{setting}={path}")
    with torch.device("meta"):
        shapes = {f"model.{name}": tensor for name, tensor in Transformer(config).state_dict().items()}
    check_same_sizes(summary["state_dict"], shapes)
    if path.is_dir():
        state = read_weights(path)
    else:
        state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")["state_dict"]
    unpacked = unpack(summary[KEY]) if summary.get(KEY) else None
    tokenizer = (Path(unpacked.name) if unpacked is not None else directory_of_run(path)) / TOKENIZER
    rope = config.rope
    reach = int((rope.original_max_seq_len or 0) * rope.factor)
    made_for = max(config.context_length or 0, config.max_seq_len or 0, reach) or 2048
    return Trained(
        replace(config, context_length=made_for),
        made_for,
        lambda name: state[name if name.startswith("model.") else f"model.{name}"],
        tokenizer if tokenizer.is_file() else None,
        unpacked=unpacked,
    )
