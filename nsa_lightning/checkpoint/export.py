"""A trained model as a Hugging Face directory: a plain Llama, Mistral or Qwen where one computes the same."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lightning.checkpoint.directory import (
    SHARD_BYTES,
    copy_tokenizer,
    new_directory,
    read_config,
    transformer_config,
    write_config,
)
from nsa_lightning.checkpoint.weights import WeightFiles, hugging_face_name, write_weights
from nsa_lightning.model.transformer import Transformer, TransformerConfig
from nsa_lightning.training.checkpoints import check_same_sizes, read_summary
from nsa_lightning.training.sharded_checkpoint import read_weights


class _Trained(NamedTuple):
    """A model to export."""

    config: TransformerConfig
    max_seq_len: int  # tokens of the context it is made for
    read: Callable[[str], Tensor]  # a tensor by its name in a Hugging Face directory
    tokenizer: Path | None  # where its tokenizer's files are


class Export(NamedTuple):
    """What was written."""

    model_type: str
    num_weights: int
    dtype: torch.dtype
    tokenizer_files: list[str]


def export(checkpoint: Path, output: Path, dtype: torch.dtype | None, tokenizer: Path | None) -> Export:
    """Export a checkpoint; arguments as `nsa export` has them, `dtype` None to keep what it has.

    Raises:
        ValueError: the checkpoint is none, the tokenizer's directory does not exist, or the output cannot be written.
    """
    if tokenizer is not None and not tokenizer.exists():
        raise ValueError(f"tokenizer must be a directory or a tokenizer.json, got {tokenizer}, which does not exist")
    trained = _open_directory(checkpoint) if (checkpoint / "config.json").is_file() else _open_checkpoint(checkpoint)
    tokenizer = tokenizer or trained.tokenizer
    with torch.device("meta"):
        model = Transformer(trained.config)
    kept = dtype or trained.read("model.embed_tokens.weight").dtype

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, _ in model.named_parameters():
            tensor = trained.read(hugging_face_name(name))
            yield hugging_face_name(name), tensor.to(dtype or tensor.dtype, copy=True)

    with new_directory(output) as directory:
        write_weights(directory, tensors(), SHARD_BYTES)
        name = str(kept).removeprefix("torch.")
        model_type = write_config(directory, trained.config, trained.max_seq_len, name, tokenizer)
        files = copy_tokenizer(tokenizer, directory) if tokenizer is not None else []
    return Export(model_type, sum(p.numel() for p in model.parameters()), kept, files)


def _open_directory(path: Path) -> _Trained:
    """A directory of `nsa convert` or `nsa export`, as it is."""
    config, max_seq_len = read_config(path, "checkpoint")
    weights = WeightFiles(path, "checkpoint")
    with torch.device("meta"):
        model = Transformer(config)
    weights.check(model)
    return _Trained(config, max_seq_len, weights.read, path)


def _open_checkpoint(path: Path) -> _Trained:
    """A checkpoint of `nsa fit`, one file or a sharded directory; its run has a tokenizer.json."""
    if not path.exists():
        raise ValueError(f"checkpoint must be a checkpoint of nsa fit or a directory of nsa convert, got {path}")
    summary = read_summary(path)
    settings = summary.get("hyper_parameters", {}).get("transformer")
    config = transformer_config(settings, f"checkpoint={path}")
    with torch.device("meta"):
        shapes = {f"model.{name}": tensor for name, tensor in Transformer(config).state_dict().items()}
    check_same_sizes(summary["state_dict"], shapes)
    if path.is_dir():
        state = read_weights(path)
    else:
        state = torch.load(path, mmap=True, weights_only=True, map_location="cpu")["state_dict"]
    tokenizer = path.resolve().parent.parent / "tokenizer.json"
    rope = config.rope
    made_for = int((rope.original_max_seq_len or 0) * rope.factor) or config.max_seq_len or 2048
    return _Trained(
        config,
        max(made_for, config.max_seq_len or 0),
        lambda name: state[name if name.startswith("model.") else f"model.{name}"],
        tokenizer if tokenizer.is_file() else None,
    )
