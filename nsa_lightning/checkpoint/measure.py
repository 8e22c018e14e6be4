"""How far two models are apart on a text, layer by layer: only one layer's weights are in memory at a time."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.checkpoint.weights import WeightFiles, hugging_face_name
from nsa_lightning.data.tokenizer import load_tokenizer
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.loss import token_cross_entropy
from nsa_lightning.model.positions import POSITION_BUCKETS, position_buckets
from nsa_lightning.model.transformer import Transformer

Model = tuple[TransformerConfig, WeightFiles]


class Sample(NamedTuple):
    """A text to measure on."""

    path: Path
    tokens: Tensor  # int64 [T]


class Difference(NamedTuple):
    """Mean loss of several models on the same text, nats a token, by the name of the model."""

    losses: dict[str, float]
    by_position: dict[str, dict[str, float]]  # from a position on, up to where the next begins
    num_tokens: int
    text: Path


def read_sample(source: Path, sample: Path | None, max_tokens: int) -> Sample:
    """The first tokens of a text file, by the tokenizer in `source`; left out, of a module of Python's own library.

    Raises:
        ValueError: the text cannot be read or is too short, or the tokenizer is broken.
    """
    path = sample or Path(argparse.__file__)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"sample must be a text file, got {path}: {error}") from error
    tokens = torch.from_numpy(load_tokenizer(str(source)).encode_batch([text])[0][:max_tokens])
    if len(tokens) < 2:
        raise SettingError(f"sample must have at least 2 tokens within sample_tokens, got {len(tokens)} of {path}")
    return Sample(path, tokens)


def measure_difference(models: dict[str, Model], sample: Sample) -> Difference:
    """Mean losses of models on a sample."""
    losses: dict[str, float] = {}
    by_position: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        nats = token_losses(*model, sample.tokens)
        losses[name] = float(nats.mean())
        buckets = position_buckets(torch.arange(len(nats)))
        for bucket in range(int(buckets[-1]) + 1):
            start, inside = str(POSITION_BUCKETS[bucket]), nats[buckets == bucket]
            by_position.setdefault(start, {})[name] = float(inside.double().mean())
    return Difference(losses, by_position, len(sample.tokens), sample.path)


@torch.inference_mode()
def token_losses(config: TransformerConfig, weights: WeightFiles, tokens: Tensor) -> Tensor:
    """Loss of each token of one document but its first, in nats, float32 [T - 1]; computed in float32.

    Args:
        config: of the decoder.
        weights: its tensors, under Hugging Face names.
        tokens: int64 [T].
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    with torch.device("meta"):
        model = Transformer(config)
    contexts = model.contexts(torch.arange(len(tokens)), torch.tensor([0, len(tokens)], dtype=torch.int32), len(tokens))
    x = F.embedding(tokens, weights.read("model.embed_tokens.weight")).float()  # [T, hidden_size]
    for index, layer in enumerate(tqdm(model.layers, desc="measure", unit="layer", disable=None)):
        names = {name: hugging_face_name(f"layers.{index}.{name}") for name, _ in layer.named_parameters()}
        layer.load_state_dict({name: weights.read(full).float() for name, full in names.items()}, assign=True)
        x, _ = layer(x, contexts[index], False)
        layer.to("meta")
    hidden = F.rms_norm(x, x.shape[-1:], weights.read("model.norm.weight").float(), config.norm_eps)
    output = weights.read("model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight")
    return token_cross_entropy(hidden[:-1], output, tokens[1:], ignore_index=-1)
