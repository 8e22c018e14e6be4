"""Text token by token: what a model keeps of the sequences that it continues, and its passes over new tokens.

A cache is memory allocated once. A layer keeps the keys and values that a later token can still see: `full` layers
those of every token, `sliding` layers those of the last ones, NSA layers both and the summaries of their blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.model.attention.base import (
    Attended,
    CachedAttention,
    CacheRoom,
    Chunk,
    LayerCache,
    Rotary,
    Step,
    TokenSlots,
)
from nsa_lightning.model.attention.dense import ExactAttention
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Residual, Transformer

# B sequences, S slots for tokens, T new tokens of one sequence, H_kv KV heads, D_qk and D_v head dims.


@dataclass
class Cache:
    """Keys and values of B sequences of different lengths, up to `capacity` tokens each.

    Lengths are kept twice: on the device for the layers, on the host for what must be known without waiting for it.
    """

    config: TransformerConfig
    capacity: int
    dtype: torch.dtype
    dense_attention: CachedAttention
    layers: list[LayerCache]
    lengths: Tensor
    """Tokens of each sequence, int32 [B], on the device."""
    host_lengths: list[int]
    """The same on the host."""
    offsets: list[int]
    """From a new token to the positions whose rotary embedding a step needs; the first is the token itself."""
    device_offsets: Tensor
    """The same on the device, int32 [offsets, 1]."""

    @classmethod
    def allocate(
        cls,
        config: TransformerConfig,
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        dense_attention: CachedAttention = ExactAttention(),  # noqa: B008 (not changed)
    ) -> "Cache":
        """An empty cache.

        Args:
            config: of the model.
            batch_size: sequences (B).
            capacity: tokens of the longest sequence, prompt and continuation.
            device: of the model.
            dtype: of the model's keys and values.
            dense_attention: how `full` layers attend to the cache.

        Raises:
            ValueError: batch_size or capacity is not positive.
        """
        for name, value in (("batch_size", batch_size), ("capacity", capacity)):
            if value < 1:
                raise SettingError(f"{name} must be at least 1, got {value}")
        shape = config.layer_shape

        def slots(size: int) -> TokenSlots:
            heads = (batch_size, size, shape.num_kv_heads)
            k = torch.zeros(*heads, shape.head_dim, device=device, dtype=dtype)
            return TokenSlots(k, k.new_zeros(*heads, shape.value_head_dim))

        layers = [
            kind.allocate(config, CacheRoom(index, capacity, slots, dense_attention))
            for index, kind in enumerate(config.layer_kinds)
        ]
        lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        others = (offset for kind in config.layer_kinds for offset in kind.step_offsets(config))
        offsets = list(dict.fromkeys([0, *others]))
        on_device = torch.tensor(offsets, dtype=torch.int32, device=device).unsqueeze(1)
        return cls(config, capacity, dtype, dense_attention, layers, lengths, [0] * batch_size, offsets, on_device)

    @staticmethod
    def bytes_needed(config: TransformerConfig, batch_size: int, capacity: int, dtype: torch.dtype) -> int:
        """Memory that `allocate` would take."""
        return Cache.allocate(config, batch_size, capacity, "meta", dtype).num_bytes

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return self.lengths.nbytes + sum(x.nbytes for x in self.tensors())

    def grown(self, capacity: int) -> "Cache":
        """The same sequences in a cache of a larger capacity."""
        rows, device = len(self.host_lengths), self.lengths.device
        larger = Cache.allocate(self.config, rows, capacity, device, self.dtype, self.dense_attention)
        for target, source in zip(larger.tensors(), self.tensors(), strict=True):
            target[:, : source.shape[1]] = source
        larger.lengths.copy_(self.lengths)
        larger.host_lengths = list(self.host_lengths)
        return larger

    def reset(self, row: int) -> None:
        """Forget a sequence: one that has ended idles at little cost, and its row takes another."""
        used = self.host_lengths[row] + 1  # one more where a step was interrupted
        for x in self.tensors():
            x[row, :used].zero_()
        self.host_lengths[row] = 0
        self.lengths[row].zero_()

    def check_room(self, row: int, num_tokens: int) -> None:
        """Raise ValueError where so many more tokens of one sequence would not fit, or there is no such sequence."""
        if not 0 <= row < len(self.host_lengths):
            raise SettingError(f"row must be from 0 to {len(self.host_lengths) - 1}, got {row}")
        length = self.host_lengths[row]
        if length + num_tokens > self.capacity:
            raise SettingError(
                f"capacity must hold the tokens of every sequence, got {self.capacity} for {length} tokens of sequence "
                f"{row} and {num_tokens} more"
            )

    def check_step(self) -> None:
        """Raise ValueError where a sequence is at its capacity; one that has ended is to be reset before."""
        for row in range(len(self.host_lengths)):
            self.check_room(row, 1)

    def count_step(self) -> None:
        """Count one token more of every sequence on the host: `decode` does, a CUDA graph of it can't.

        Raises:
            ValueError: a sequence is at its capacity.
        """
        self.check_step()
        self.host_lengths = [length + 1 for length in self.host_lengths]

    def tensors(self) -> Iterator[Tensor]:
        """All that the layers keep."""
        for layer in self.layers:
            yield from layer.tensors()

    def chunks(self, row: int, num_tokens: int, rotary: Callable[[Tensor], Rotary]) -> list[Any]:
        """What each layer needs to know of the next `num_tokens` tokens of one sequence."""
        start = self.host_lengths[row]
        stop = start + num_tokens
        positions = torch.arange(start, stop, device=self.lengths.device)
        chunk = Chunk(row, start, stop, positions[-1], rotary(positions))
        return self.config.for_layers(lambda kind: kind.chunk(self.config, chunk, rotary))

    def count_chunk(self, row: int, num_tokens: int) -> None:
        """Count new tokens of one sequence."""
        self.host_lengths[row] += num_tokens
        self.lengths[row].fill_(self.host_lengths[row])

    def step(self, rotary: Callable[[Tensor], Rotary]) -> Step:
        """The next token of every sequence, as numbers on the device; a full sequence writes over its last one."""
        if len(self.offsets) == 1:
            positions = self.lengths.clamp(max=self.capacity - 1)
            own = rotary(positions)
            return Step(positions, own, {0: own})
        positions = (self.lengths + self.device_offsets).clamp(0, self.capacity - 1)  # as many launches as above
        cosines, sines = (x.unflatten(0, positions.shape) for x in rotary(positions.flatten()))
        pairs = zip(cosines, sines, strict=True)
        rotary_at = dict(zip(self.offsets, pairs, strict=True))
        return Step(positions[0], rotary_at[0], rotary_at)


@torch.no_grad()
def prefill(
    model: Transformer, tokens: Tensor, cache: Cache, row: int, chunk_size: int = 16384, every: bool = False
) -> Tensor:
    """Append tokens to one sequence of the cache, behind those that it holds; interrupted, it holds none.

    Args:
        model: the decoder.
        tokens: int64 [T].
        cache: of the model's config.
        row: index of the sequence.
        chunk_size: tokens that are computed at a time, which bounds the memory beside the cache.
        every: return the states of every token.

    Returns:
        Final hidden states of the last token, [hidden_size]; of every token [T, hidden_size].

    Raises:
        ValueError: there are no tokens, more than the cache has room for, or chunk_size is not positive.
    """
    if chunk_size < 1:
        raise SettingError(f"chunk_size must be at least 1, got {chunk_size}")
    if tokens.ndim != 1 or not len(tokens):
        raise SettingError(f"tokens must be [T] with at least one token, got {tuple(tokens.shape)}")
    cache.check_room(row, len(tokens))
    hidden = []
    try:
        for part in tokens.split(chunk_size):
            chunks = cache.chunks(row, len(part), model.rotary)
            cache.count_chunk(row, len(part))
            attend = [
                partial(block.self_attn.prefill, cache=kept, chunk=chunk)
                for block, kept, chunk in zip(model.blocks, cache.layers, chunks, strict=True)
            ]
            stream = _advanced(model, part, attend)
            if every:
                hidden.append(stream.normed(model.norm)[1])
    except BaseException:  # some layers hold the tokens, some do not
        cache.reset(row)
        raise
    return torch.cat(hidden) if every else stream.last_token.normed(model.norm)[1][0]


@torch.no_grad()
def decode(model: Transformer, tokens: Tensor, cache: Cache) -> Tensor:
    """Append one token to each sequence of the cache.

    Nothing is read back to the host, and shapes and addresses stay as they are: fit for a CUDA graph, captured
    with an empty cache that is reset afterwards, with `cache.count_step()` before each replay.

    Args:
        model: the decoder.
        tokens: int64 [B].
        cache: of the model's config.

    Returns:
        Final hidden states, [B, hidden_size].

    Raises:
        ValueError: not one token a sequence, or a sequence is at its capacity.
    """
    if tokens.shape != cache.lengths.shape:
        raise SettingError(f"tokens must be [B], {tuple(cache.lengths.shape)} here, got {tuple(tokens.shape)}")
    cache.check_step()
    step = cache.step(model.rotary)
    attend = [
        partial(block.self_attn.decode, cache=kept, step=step)
        for block, kept in zip(model.blocks, cache.layers, strict=True)
    ]
    stream = _advanced(model, tokens, attend)
    torch.add(step.positions, 1, out=cache.lengths)
    cache.count_step()
    return stream.normed(model.norm)[1]


def _advanced(model: Transformer, tokens: Tensor, attend: Sequence[Callable[[Tensor], Attended]]) -> Residual:
    """The residual stream of new tokens after all layers, whose attention is called by `attend`."""
    stream = Residual(model.embed_tokens(tokens), fused=True)
    for block, call in zip(model.blocks, attend, strict=True):
        stream, _ = block.advance(stream, call)
    return stream
