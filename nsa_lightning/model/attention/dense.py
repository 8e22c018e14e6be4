"""The kinds `full` and `sliding`: grouped-query causal attention to the whole document, or to its last tokens."""

from collections.abc import Iterator
from typing import NamedTuple

from nsa_kernels.decode.attention import append_tokens, decode_dense_attention
from nsa_kernels.elementwise import rotate
from torch import Tensor

from nsa_lightning.model.attention.base import (
    Attended,
    CachedAttention,
    CacheRoom,
    Chunk,
    Lengths,
    PackedContext,
    Step,
    TokenSlots,
)
from nsa_lightning.model.attention.pairs import causal_pairs, window_pairs
from nsa_lightning.model.attention.projections import GroupedQueryAttention
from nsa_lightning.model.config import AttentionKind, LayerShape, TransformerConfig
from nsa_lightning.model.fused_attention import chunk_causal_attention, packed_causal_attention


class ExactAttention(NamedTuple):
    """Attention to all that is cached, or to the last `window_size` tokens of it; see `CachedAttention`."""

    window_size: int | None = None

    def prefill(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """New tokens of one sequence, q [T, H, D_qk] -> [T, H, D_v]; a window may have keys of less than all tokens."""
        return chunk_causal_attention(q, k, v, self.window_size)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """A new token of each sequence, q [B, H, D_qk] -> [B, H, D_v]; with a window token t is in slot t % S."""
        return decode_dense_attention(q, k, v, positions, self.window_size)


class DenseCache(NamedTuple):
    """What a dense layer keeps, and how it attends to it."""

    tokens: TokenSlots  # rotated keys
    attention: CachedAttention
    layer: int  # index of the decoder layer

    def tensors(self) -> Iterator[Tensor]:
        """Keys and values."""
        yield from self.tokens


class DenseAttention(GroupedQueryAttention):
    """Causal attention to the whole document, or to its last `window_size` tokens, the query's own included."""

    def __init__(self, shape: LayerShape, window_size: int | None = None) -> None:
        super().__init__(shape)
        self.window_size = window_size

    def forward(self, x: Tensor, context: PackedContext, watch: bool = False) -> Attended:
        """As `AttentionLayer.forward`; there are no branches to watch."""
        k, v = self.key_value(x)
        q, k = self.rotated_query(x, context.rotary), rotate(k, *context.rotary)
        q, k, v = context.parallel.to_heads(q, k, v)
        out = packed_causal_attention(q, k, v, context.cu_seqlens, context.max_seqlen, self.window_size)
        return Attended(self.output(context.parallel.to_tokens(out)))

    def prefill(self, x: Tensor, cache: DenseCache, chunk: Chunk) -> Attended:
        """As `AttentionLayer.prefill`."""
        k, v = self.key_value(x)
        q, k = self.rotated_query(x, chunk.rotary), rotate(k, *chunk.rotary)
        reach = chunk.start if self.window_size is None else self.window_size - 1
        k, v = cache.tokens.extend(chunk.row, chunk.start, k, v, reach)
        return Attended(self.output(cache.attention.prefill(cache.layer, chunk.row, chunk.start, q, k, v)))

    def decode(self, x: Tensor, cache: DenseCache, step: Step) -> Attended:
        """As `AttentionLayer.decode`."""
        q, k, v = self.mapped(x)
        new = cache.tokens.new_tokens(*self.as_heads(k, v))
        q = append_tokens(self.query_heads(q), [new], step.positions, step.rotary)
        return Attended(self.output(cache.attention.decode(cache.layer, q, *cache.tokens, step.positions)))


class FullKind(AttentionKind):
    """Attention to all earlier tokens of the document."""

    operators = (
        "torch_attn::",
        "aten::_scaled_dot_product_",
        "aten::_flash_attention_forward",
        "aten::_efficient_attention_forward",
    )

    def build(self, config: TransformerConfig) -> DenseAttention:
        """A layer without a window."""
        return DenseAttention(config.layer_shape)

    def allocate(self, config: TransformerConfig, room: CacheRoom) -> DenseCache:
        """Slots for every token, and the method that the cache was made with."""
        return DenseCache(room.slots(room.capacity), room.dense_attention, room.layer)

    def visible_pairs(self, config: TransformerConfig, lengths: Lengths) -> Lengths:
        """Every token and all before it."""
        return causal_pairs(lengths)


class SlidingKind(AttentionKind):
    """Attention to the last `sliding_window` tokens of the document."""

    settings = ("sliding_window",)
    operators = FullKind.operators

    def build(self, config: TransformerConfig) -> DenseAttention:
        """A layer with a window."""
        return DenseAttention(config.layer_shape, config.sliding_window)

    def allocate(self, config: TransformerConfig, room: CacheRoom) -> DenseCache:
        """Slots for the tokens of the window."""
        slots = room.slots(min(room.capacity, config.sliding_window))
        return DenseCache(slots, ExactAttention(config.sliding_window), room.layer)

    def visible_pairs(self, config: TransformerConfig, lengths: Lengths) -> Lengths:
        """Every token and those before it in its window."""
        return window_pairs(lengths, config.sliding_window)
