"""A trained model on disk, whatever wrote it: its settings, its tensors by name and where its tokenizer is."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.checkpoint.directory import read_config, transformer_config
from nsa_lightning.checkpoint.weights import WeightFiles
from nsa_lightning.model.transformer import Transformer, TransformerConfig


class Trained(NamedTuple):
    """A model whose weights can be read."""

    config: TransformerConfig
    max_seq_len: int  # tokens of the context it is made for
    read: Callable[[str], Tensor]  # a tensor by its name in a Hugging Face directory
    tokenizer: Path | None  # where its tokenizer's files are


def open_trained(path: Path, setting: str) -> Trained:
    """Open a checkpoint of `nsa fit` or a directory of ours or of a dense family; `setting` is what the user calls it.

    Raises:
        ValueError: it is none of them, incomplete, or its weights do not fit its settings.
    """
    return _open_directory(path, setting) if (path / "config.json").is_file() else _open_checkpoint(path, setting)


def _open_directory(path: Path, setting: str) -> Trained:
    """A directory of `nsa convert` or `nsa export`, or a dense one, as it is."""
    config, max_seq_len = read_config(path, setting)
    weights = WeightFiles(path, setting)
    with torch.device("meta"):
        model = Transformer(config)
    weights.check(model)
    return Trained(config, max_seq_len, weights.read, path)


def _open_checkpoint(path: Path, setting: str) -> Trained:
    """A checkpoint of `nsa fit`, one file or a sharded directory; its run has a tokenizer.json."""
    kinds = f"{setting} must be a checkpoint of nsa fit or a directory of nsa convert, nsa export or a dense model"
    if not path.exists():
        raise SettingError(f"{kinds}, got {path}, which does not exist")
    from nsa_lightning.training.checkpoints import check_same_sizes, read_summary  # imports Lightning: seconds
    from nsa_lightning.training.sharded_checkpoint import META, read_weights

    if path.is_dir() and not (path / META).is_file():
        raise SettingError(f"{kinds}, got the directory {path}, which lacks {META} and config.json")
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
    beside = [folder / "tokenizer.json" for folder in path.resolve().parents[:2]]  # checkpoint.dirpath, or the run's
    rope = config.rope
    made_for = int((rope.original_max_seq_len or 0) * rope.factor) or config.max_seq_len or 2048
    return Trained(
        config,
        max(made_for, config.max_seq_len or 0),
        lambda name: state[name if name.startswith("model.") else f"model.{name}"],
        next((tokenizer for tokenizer in beside if tokenizer.is_file()), None),
    )
