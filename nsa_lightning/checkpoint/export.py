"""A trained model as a Hugging Face directory: a plain Llama, Mistral or Qwen where one computes the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.checkpoint.directory import SHARD_BYTES, new_directory, write_config
from nsa_lightning.checkpoint.tokenizer_files import check_tokenizer, complete_tokenizer, copy_tokenizer
from nsa_lightning.checkpoint.trained import open_trained
from nsa_lightning.checkpoint.weights import hugging_face_name, write_weights
from nsa_lightning.model.transformer import Transformer


class Export(NamedTuple):
    """What was written."""

    model_type: str
    num_weights: int
    dtype: torch.dtype
    tokenizer_files: list[str]
    remark: str | None


def export(checkpoint: Path, output: Path, dtype: torch.dtype | None, tokenizer: Path | None) -> Export:
    """Export a checkpoint; arguments as `nsa export` has them, `dtype` None to keep what it has.

    Raises:
        ValueError: the checkpoint is none, the tokenizer does not exist or has more tokens than the model, or the
            output cannot be written.
    """
    if tokenizer is not None and not tokenizer.exists():
        raise SettingError(f"tokenizer must be a directory or a tokenizer.json, got {tokenizer}, which does not exist")
    trained = open_trained(checkpoint, "checkpoint")
    tokenizer = tokenizer or trained.tokenizer
    if tokenizer is not None:
        check_tokenizer(tokenizer, trained.config.vocab_size)
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
        files = copy_tokenizer(tokenizer, directory) if tokenizer is not None else []
        special_tokens = complete_tokenizer(tokenizer, directory) if tokenizer is not None else {}
        model_type = write_config(directory, trained.config, name, special_tokens)
    return Export(model_type, sum(p.numel() for p in model.parameters()), kept, files, trained.remark)
