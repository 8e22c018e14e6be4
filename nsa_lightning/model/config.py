"""Settings of the decoder, and the type of its attention kinds."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from nsa_kernels import NSAConfig
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor

from nsa_lightning.model.attention.base import (
    AttentionLayer,
    CacheRoom,
    Chunk,
    LayerCache,
    Lengths,
    PackedContext,
    Rotary,
)
from nsa_lightning.model.rope import RopeConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class NSALayerConfig(NSAConfig):
    """Geometry and learned parts of the NSA layers (arXiv:2502.11089).

    Raises:
        ValueError: as NSAConfig, an unknown name, or a hidden size that is not positive.
    """

    compression: Literal["mean", "linear", "mlp"] = "mlp"
    """Block summary: the mean alone, or the mean plus a learned map that starts at zero."""

    compression_hidden_size: int | None = None
    """Hidden units of the `mlp` summary; the head dimension if not given."""

    compress_rope: Literal["after", "before", "none"] = "after"
    """Rotate the key summary at its block's centre, rotate the keys before they are summarised, or neither."""

    kv_sharing: Literal["separate", "shared"] = "shared"
    """One pair of key and value projections for all branches, or own ones for every branch (the paper)."""

    gate_hidden_size: int | None = None
    """Hidden units of the gate MLP; a single linear map if not given."""

    branch_start: Literal["equal", "independent"] = "equal"
    """First weights of the branches' own key and value projections: those of the selected branch, or numbers of their
    own, with which a model learns to copy from its context much later. Without effect with kv_sharing: shared."""

    gate_start: float = 0.5
    """Gate that the biases of a new layer give every branch, above 0 and below 1; `nsa convert` has its own rule."""

    backend: Literal["auto", "triton", "eager", "reference"] = "auto"
    """Implementation of the attention operator; `auto` picks the fastest that takes the device and the sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("compression_hidden_size", "gate_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if not 0 < self.gate_start < 1:
            raise SettingError(f"gate_start must be above 0 and below 1, got {self.gate_start}")


class LayerShape(NamedTuple):
    """Sizes of one attention layer."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and choices of the decoder.

    Raises:
        ValueError: sizes that do not fit each other, an unknown name, or a value of another type.
    """

    vocab_size: int = 4096
    """Rows of the embedding; at least the tokenizer's vocabulary."""

    hidden_size: int = 768
    """Width of the residual stream."""

    num_layers: int = 12
    """Decoder blocks."""

    num_heads: int = 12
    """Query heads; a multiple of num_kv_heads."""

    num_kv_heads: int = 4
    """Key/value heads (GQA)."""

    head_dim: int | None = None
    """Dimensions of a query and key head; hidden_size / num_heads if not given."""

    value_head_dim: int | None = None
    """Dimensions of a value head; head_dim if not given."""

    intermediate_size: int = 2048
    """Hidden units of the feed-forward layer."""

    attention: list[str] = field(default_factory=lambda: ["nsa"])
    """Attention by layer: `nsa`, `full` or `sliding`; a shorter list repeats over the layers."""

    sliding_window: int = 4096
    """Tokens that a `sliding` layer sees, the query's own included."""

    nsa: NSALayerConfig = field(default_factory=NSALayerConfig)
    """The `nsa` layers."""

    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary position embedding."""

    max_seq_len: int | None = None
    """Longest training sequence, tokens; `nsa fit` takes it from data.seq_len."""

    context_length: int | None = None
    """Tokens of the longest text that the model is made for, which generation and exports tell. Left out: that of
    model.init_from, else the longest training sequence or what the scaling of rope reaches."""

    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""

    qk_norm: bool = False
    """RMSNorm on every query and key head (Qwen3)."""

    qkv_bias: bool = False
    """Bias in the query, key and value projections (Qwen2)."""

    tie_embeddings: bool = True
    """Use the input embedding as output embedding."""

    def __post_init__(self) -> None:
        check_types(self)
        if not ATTENTION_KINDS.keys() >= set(self.attention):
            names = ", ".join(ATTENTION_KINDS)
            raise SettingError(f"attention must be a list of values that are each one of {names}, got {self.attention}")
        for name in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "value_head_dim",
            "intermediate_size",
            "sliding_window",
            "context_length",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise SettingError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise SettingError(
                "hidden_size must be a multiple of num_heads where head_dim is not set, "
                f"got {self.hidden_size} and {self.num_heads}"
            )
        if self.norm_eps < 0:
            raise SettingError(f"norm_eps must be at least 0, got {self.norm_eps}")
        if self.query_head_dim % 2:
            raise SettingError(f"head_dim must be even for rotary embedding, got {self.query_head_dim}")
        if not self.attention or self.num_layers % len(self.attention):
            raise SettingError(
                "attention must have a length that divides num_layers, "
                f"got {len(self.attention)} names for {self.num_layers} layers"
            )
        for name in dict.fromkeys(self.attention):
            ATTENTION_KINDS[name].check(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TransformerConfig":
        """The config whose `dataclasses.asdict` is `settings`, as checkpoints hold it."""
        nested = {"nsa": NSALayerConfig(**settings["nsa"]), "rope": RopeConfig(**settings["rope"])}
        return cls(**(settings | nested))

    @property
    def query_head_dim(self) -> int:
        """Dimensions of a query and key head (D_qk)."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def layer_shape(self) -> LayerShape:
        """Sizes of every attention layer."""
        return LayerShape(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.query_head_dim,
            value_head_dim=self.query_head_dim if self.value_head_dim is None else self.value_head_dim,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            norm_eps=self.norm_eps,
        )

    @property
    def layer_attention(self) -> list[str]:
        """The attention of each layer, num_layers names."""
        return self.attention * (self.num_layers // len(self.attention))

    @property
    def layer_kinds(self) -> list["AttentionKind"]:
        """The same as kinds."""
        return [ATTENTION_KINDS[name] for name in self.layer_attention]

    def for_layers(self, make: Callable[["AttentionKind"], T]) -> list[T]:
        """What is made once for each attention kind, by layer."""
        made = {name: make(ATTENTION_KINDS[name]) for name in dict.fromkeys(self.attention)}
        return [made[name] for name in self.layer_attention]


class AttentionKind(ABC):
    """What the toolkit asks of an attention kind that needs no weights; `AttentionLayer` is what it builds."""

    settings: tuple[str, ...] = ()
    """Fields of TransformerConfig that no other kind reads: they change nothing where no layer is of this kind."""

    new_parts: tuple[str, ...] = ()
    """Modules of a layer that a dense one has no counterpart of, by name: they may train at a rate of their own."""

    copies: tuple[str, ...] = ()
    """Modules of a layer that repeat projections of the layer itself; conversion starts them with the same weights."""

    operators: tuple[str, ...] = ()
    """Beginnings of the names of operators whose results selective recomputation keeps, such as `aten::_flash`."""

    has_branches: bool = False
    """Whether a layer that watches returns statistics of its branches."""

    @abstractmethod
    def build(self, config: TransformerConfig) -> AttentionLayer:
        """A layer, its parameters without their first values."""

    @abstractmethod
    def allocate(self, config: TransformerConfig, room: CacheRoom) -> LayerCache:
        """An empty cache of a layer."""

    @abstractmethod
    def visible_pairs(self, config: TransformerConfig, lengths: Lengths) -> Lengths:
        """Query-key pairs that one head of a layer computes in each document, [N]."""

    def check(self, config: TransformerConfig) -> None:  # noqa: B027 (most kinds have nothing to check)
        """Raise ValueError where sizes of a model with such layers do not fit."""

    def context(
        self, config: TransformerConfig, batch: PackedContext, num_tokens: int, rotary: Callable[[Tensor], Rotary]
    ) -> Any:
        """What the layers are given of a batch of `num_tokens` on all ranks that share it; made once for all layers."""
        return batch

    def chunk(self, config: TransformerConfig, chunk: Chunk, rotary: Callable[[Tensor], Rotary]) -> Any:
        """What the layers are given of new tokens of one sequence; made once for all layers."""
        return chunk

    def step_offsets(self, config: TransformerConfig) -> tuple[int, ...]:
        """How far from a new token's position others are whose rotary embedding a step needs (`Step.rotary_at`)."""
        return ()


ATTENTION_KINDS: dict[str, AttentionKind] = {}
"""By the name that settings give them; `attention/registry.py` lists them."""
