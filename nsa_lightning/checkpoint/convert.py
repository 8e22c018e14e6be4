"""A dense Hugging Face model as an NSA model: the same weights, one layer's keys and values for all branches.

The summaries start as the mean, the gates with the selected branch open, σ(4) = 0.982, the others nearly shut at 0.018.
With gates of exactly 0, 1, 0 the model is the dense one wherever a document has at most n · l' tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor

from nsa_lightning.checkpoint.continuation import write_continuation
from nsa_lightning.checkpoint.dense import SavedModel, read_dense_config, shortest_pattern
from nsa_lightning.checkpoint.directory import SHARD_BYTES, new_directory, write_config
from nsa_lightning.checkpoint.measure import Difference, measure_difference, read_sample
from nsa_lightning.checkpoint.tokenizer_files import check_tokenizer, copy_tokenizer, special_token_ids
from nsa_lightning.checkpoint.weights import WeightFiles, hugging_face_name, write_weights
from nsa_lightning.model.attention.registry import name_in_dense_model
from nsa_lightning.model.config import ATTENTION_KINDS, NSALayerConfig, TransformerConfig
from nsa_lightning.model.initialization import fill_normal
from nsa_lightning.model.rope import RopeConfig
from nsa_lightning.model.transformer import Transformer

OPEN = 4.0
"""Bias of an open gate before its sigmoid, where nothing else is asked for; a shut one has its negative."""

CONVERTED = NSALayerConfig(num_selected_blocks=32, kv_sharing="shared", compression="mean")
"""The geometry and learned parts that did best of those tried (`docs/continued-training.md`)."""


@dataclass(frozen=True, kw_only=True)
class RopeChange:
    """What changes in the rotary embedding, for a longer context; what is left out stays as the model has it."""

    scaling: Literal["none", "linear", "llama3", "yarn"] | None = None
    """How frequencies are scaled, in place of what the model does."""

    factor: float | None = None
    """How many times longer than the model's original context; needed by `linear`, `llama3` and `yarn`."""

    theta: float | None = None
    """Base of the frequencies."""

    def __post_init__(self) -> None:
        check_types(self, "rope.")

    def apply(self, rope: RopeConfig, max_seq_len: int) -> RopeConfig:
        """The changed embedding of a model made for `max_seq_len` tokens.

        Raises:
            ValueError: a scaling lacks its factor, or a factor its scaling.
        """
        theta = rope.theta if self.theta is None else self.theta
        scaling = rope.scaling if self.scaling is None else self.scaling
        if self.factor is None and scaling not in (rope.scaling, "none"):
            raise SettingError(f"rope.factor must be set with rope.scaling={scaling}, got none")
        unchanged = rope.factor if scaling == rope.scaling else 1.0
        factor = unchanged if self.factor is None else self.factor
        original = rope.original_max_seq_len or int(max_seq_len / rope.factor)
        return replace(rope, theta=theta, scaling=scaling, factor=factor, original_max_seq_len=original)

    def reach(self, rope: RopeConfig, max_seq_len: int) -> int:
        """Tokens of the context for which a model is made after the change, and was for `max_seq_len` before it."""
        changed = self.apply(rope, max_seq_len)
        if changed.scaling == "none" or changed.factor == rope.factor:
            return max_seq_len
        return int((changed.original_max_seq_len or max_seq_len) * changed.factor)


class Conversion(NamedTuple):
    """What was made of a dense model."""

    config: TransformerConfig
    copied: int  # weights taken from the source, once each
    repeated: int  # weights that start as copies of those
    new: int  # weights that start from a rule
    tokenizer_files: list[str]
    difference: Difference | None  # None where nothing was measured
    remarks: list[str]


def convert(
    source: Path,
    output: Path,
    attention: list[str],
    nsa: NSALayerConfig,
    rope: RopeChange,
    seq_len: int,
    sample: Path | None,
    sample_tokens: int,
    gate_bias: float = OPEN,
) -> Conversion:
    """Convert tensor by tensor; arguments as `nsa convert` has them.

    Raises:
        ValueError: the source cannot be converted, the settings do not fit it, or the output cannot be written.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    if not 0 <= gate_bias < float("inf"):
        raise SettingError(f"gate_bias must be at least 0 and finite, got {gate_bias}")
    dense = read_dense_config(source, "source")
    config = _nsa_config(dense, attention, nsa, rope, seq_len)
    weights = WeightFiles(source, "source")
    with torch.device("meta"):
        weights.check(Transformer(dense.config))
        model = Transformer(config)
    check_tokenizer(source, config.vocab_size)
    origins = {name: _origin(name, weights) for name, _ in model.named_parameters()}
    measured = sample_tokens > 0 and (source / "tokenizer.json").is_file()
    text = read_sample(source, sample, sample_tokens) if measured else None
    with new_directory(output) as directory:
        tensors = _tensors(model, weights, origins, gate_bias)
        tensors = tqdm(tensors, desc="convert", total=len(origins), unit="tensor", disable=None)
        write_weights(directory, tensors, min(SHARD_BYTES, weights.largest_file // 2))
        dtype = str(weights.dtype("model.embed_tokens.weight")).removeprefix("torch.")
        tokenizer_files = copy_tokenizer(source, directory)
        write_config(directory, config, dtype, special_token_ids(source))
        write_continuation(directory, output.resolve(), source, config, seq_len)
    difference = None
    if text is not None:
        models = {"source": (dense.config, weights)}
        if rope != RopeChange():
            models["source with this rope"] = (replace(dense.config, rope=config.rope), weights)
        difference = measure_difference(models | {"converted": (config, WeightFiles(output, "output"))}, text)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    copied = sum(size for name, size in sizes.items() if origins[name] == hugging_face_name(name))
    new = sum(size for name, size in sizes.items() if origins[name] is None)
    remarks = _remarks(dense, config, seq_len, tokenizer_files)
    return Conversion(config, copied, sum(sizes.values()) - copied - new, new, tokenizer_files, difference, remarks)


def _nsa_config(
    dense: SavedModel, attention: list[str], nsa: NSALayerConfig, rope: RopeChange, seq_len: int
) -> TransformerConfig:
    """The decoder with the wanted layers."""
    window = dense.config.sliding_window if "sliding" in dense.config.attention else None
    if "sliding" in attention and window is None:
        raise SettingError(
            "attention must name nsa and full layers alone where the source has no sliding_window, got sliding"
        )
    changed = rope.apply(dense.config.rope, dense.max_seq_len)
    return replace(
        dense.config,
        attention=shortest_pattern(attention),
        nsa=nsa,
        rope=changed,
        max_seq_len=seq_len,
        context_length=rope.reach(dense.config.rope, dense.max_seq_len),
    )


def _origin(name: str, weights: WeightFiles) -> str | None:
    """The source's tensor that a parameter starts from; None for a new part."""
    hugging_face = hugging_face_name(name_in_dense_model(name))
    return hugging_face if hugging_face in weights.shapes else None


def _tensors(
    model: Transformer, weights: WeightFiles, origins: dict[str, str | None], gate_bias: float
) -> Iterator[tuple[str, Tensor]]:
    """The converted model's tensors, one at a time; new ones in the dtype of the source's embedding."""
    dtype = weights.dtype("model.embed_tokens.weight")
    for name, parameter in model.named_parameters():
        origin = origins[name]
        first = (
            weights.read(origin) if origin is not None else _first_value(model, name, parameter, gate_bias).to(dtype)
        )
        yield hugging_face_name(name), first


def _first_value(model: Transformer, name: str, parameter: Tensor, gate_bias: float) -> Tensor:
    """A new part: gates of fixed weight, everything else as a model starts that is trained from scratch."""
    converted = model.converted_value(name, gate_bias)
    if converted is not None:
        return converted
    tensor = torch.zeros(parameter.shape)
    fill_normal(tensor, *model.first_values(name), seed=0, name=name)
    return tensor


def _remarks(dense: SavedModel, config: TransformerConfig, seq_len: int, tokenizer_files: list[str]) -> list[str]:
    """What the user should know and would not see."""
    remarks = [dense.remark] if dense.remark is not None else []
    beyond = [
        name
        for name, kind in ATTENTION_KINDS.items()
        if name in config.attention and "sliding_window" not in kind.settings
    ]
    if "sliding" in dense.config.attention and beyond:
        remarks.append(
            f"the source has a sliding_window of {dense.config.sliding_window} tokens: "
            f"{' and '.join(beyond)} layers see beyond it, so that they can equal the source up to there only"
        )
    if config.context_length is not None and seq_len > config.context_length:
        remarks.append(
            f"seq_len {seq_len} is beyond the context of {config.context_length} tokens; --rope.scaling extends it"
        )
    if "tokenizer.json" not in tokenizer_files:
        remarks.append("the source has no tokenizer.json: set data.tokenizer.path; the difference was not measured")
    return remarks
