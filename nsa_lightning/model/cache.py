"""What a model keeps of the sequences that it continues, in memory allocated once.

A layer keeps the keys and values that a later token can still see: `full` layers those of every token, `sliding` layers
those of the last ones, NSA layers both and the summaries of the compression blocks, one for d tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from nsa_kernels import NSAConfig
from nsa_kernels.decode.attention import LayerCache, NewTokens, StartedBlocks
from nsa_kernels.errors import SettingError
from torch import Tensor

if TYPE_CHECKING:
    from nsa_lightning.model.attention import AttentionKind, Rotary
    from nsa_lightning.model.transformer import TransformerConfig

# B sequences, S slots for tokens, T new tokens of one sequence, H_kv KV heads, D_qk and D_v head dims, l tokens in a
# compression block, d its stride.


class Chunk(NamedTuple):
    """Where new tokens of one sequence stand, for every layer."""

    row: int
    start: int  # position of the first new token
    last: Tensor  # position of the last one, int64 []
    rotary: "Rotary"  # of the tokens, [T, R/2] each
    blocks: range  # the compression blocks that they complete
    block_rotary: "Rotary | None"  # of the blocks' centres, where summaries are rotated


class Step(NamedTuple):
    """Where the new token of each sequence stands, for every layer; on the device alone."""

    positions: Tensor  # int32 [B]
    rotary: "Rotary"  # of the tokens, [B, R/2] each
    block_rotary: "Rotary | None"  # of the centres of the blocks that the tokens may complete, if summaries are rotated


class TokenSlots(NamedTuple):
    """Keys and values of the last S tokens of each sequence, token t in slot t % S."""

    k: Tensor  # [B, S, H_kv, D_qk]
    v: Tensor  # [B, S, H_kv, D_v]

    @property
    def size(self) -> int:
        """Slots of a sequence."""
        return self.k.shape[1]

    def extend(self, row: int, start: int, k: Tensor, v: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """Append T tokens to one sequence and return them behind up to `reach` tokens that precede them, in order."""
        self._check(k)
        first, end = max(start - reach, 0), start + len(k)
        if end <= self.size:
            self.k[row, start:end], self.v[row, start:end] = k, v
            return self.k[row, first:end], self.v[row, first:end]
        device = self.k.device
        past = torch.arange(first, start, device=device) % self.size
        seen = torch.cat([self.k[row, past], k]), torch.cat([self.v[row, past], v])
        kept = min(len(k), self.size)
        slots = torch.arange(end - kept, end, device=device) % self.size
        self.k[row, slots], self.v[row, slots] = k[-kept:], v[-kept:]
        return seen

    def new_tokens(self, k: Tensor, v: Tensor, rotate: bool = True) -> NewTokens:
        """One token of each sequence, [B, H_kv, D], as `append_tokens` takes it."""
        return NewTokens(k, v, self.k, self.v, rotate)

    def _check(self, k: Tensor) -> None:
        if k.dtype != self.k.dtype:
            raise SettingError(f"dtype of the cache must be that of the model's keys, {k.dtype}, got {self.k.dtype}")


class LayerTokens(NamedTuple):
    """What one layer keeps; all but the first are an NSA layer's own."""

    tokens: TokenSlots  # rotated keys; of NSA's selected branch
    sliding: TokenSlots | None = None  # rotated keys of the sliding branch; None where it shares those above
    pending: TokenSlots | None = None  # the last l tokens that the compressed branch has yet to summarise
    summaries: TokenSlots | None = None  # compression block i in slot i
    started: StartedBlocks | None = None

    def operands(self) -> LayerCache:
        """The same as `decode_attention` takes it."""
        assert self.summaries is not None
        return LayerCache(*self.tokens, *(self.sliding or self.tokens), *self.summaries)


@dataclass
class Cache:
    """Keys and values of B sequences of different lengths, up to `capacity` tokens each.

    Lengths are kept twice: on the device for the layers, on the host for what must be known without waiting for it.
    """

    config: "TransformerConfig"
    capacity: int
    layers: list[LayerTokens]
    lengths: Tensor
    """Tokens of each sequence, int32 [B], on the device."""
    host_lengths: list[int]
    """The same on the host."""
    to_centre: Tensor
    """From a token to itself and to the centre of the compression block that it would complete, int32 [2, 1]."""

    @classmethod
    def allocate(
        cls,
        config: "TransformerConfig",
        batch_size: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Cache":
        """An empty cache.

        Args:
            config: of the model.
            batch_size: sequences (B).
            capacity: tokens of the longest sequence, prompt and continuation.
            device: of the model.
            dtype: of the model's keys and values.

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

        layers = [_allocate_layer(config, kind, capacity, slots) for kind in config.layer_attention]
        lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        centre = 1 + config.nsa.compress_block_size // 2 - config.nsa.compress_block_size
        to_centre = torch.tensor([[0], [centre]], dtype=torch.int32, device=device)
        return cls(config, capacity, layers, lengths, [0] * batch_size, to_centre)

    @staticmethod
    def bytes_needed(config: "TransformerConfig", batch_size: int, capacity: int, dtype: torch.dtype) -> int:
        """Memory that `allocate` would take."""
        return Cache.allocate(config, batch_size, capacity, "meta", dtype).num_bytes

    @property
    def num_bytes(self) -> int:
        """Memory of all layers."""
        return self.lengths.nbytes + sum(x.nbytes for x in self._tensors())

    def grown(self, capacity: int) -> "Cache":
        """The same sequences in a cache of a larger capacity."""
        larger = Cache.allocate(self.config, len(self.host_lengths), capacity, self.lengths.device, self._dtype)
        for target, source in zip(larger._tensors(), self._tensors(), strict=True):
            target[:, : source.shape[1]] = source
        larger.lengths.copy_(self.lengths)
        larger.host_lengths = list(self.host_lengths)
        return larger

    def reset(self, row: int) -> None:
        """Forget a sequence: one that has ended idles at little cost, and its row takes another."""
        used = self.host_lengths[row] + 1  # one more where a step was interrupted
        for x in self._tensors():
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

    def chunk(self, row: int, num_tokens: int, rotary: Callable[[Tensor], "Rotary"]) -> Chunk:
        """The next `num_tokens` tokens of one sequence."""
        start, nsa, device = self.host_lengths[row], self.config.nsa, self.lengths.device
        blocks, block_rotary = _completed_blocks(nsa, start, start + num_tokens), None
        if self._rotates_summaries:
            index = torch.arange(blocks.start, blocks.stop, device=device)
            block_rotary = rotary(index * nsa.compress_stride + nsa.compress_block_size // 2)
        positions = torch.arange(start, start + num_tokens, device=device)
        return Chunk(row, start, positions[-1], rotary(positions), blocks, block_rotary)

    def count_chunk(self, row: int, num_tokens: int) -> None:
        """Count new tokens of one sequence."""
        self.host_lengths[row] += num_tokens
        self.lengths[row].fill_(self.host_lengths[row])

    def step(self, rotary: Callable[[Tensor], "Rotary"]) -> Step:
        """The next token of every sequence, as numbers on the device; a full sequence writes over its last one."""
        if not self._rotates_summaries:
            positions = self.lengths.clamp(max=self.capacity - 1)
            return Step(positions, rotary(positions), None)
        both = (self.lengths + self.to_centre).clamp(0, self.capacity - 1)  # [2, B], as many launches as above
        cosines, sines = (x.unflatten(0, both.shape) for x in rotary(both.flatten()))
        return Step(both[0], (cosines[0], sines[0]), (cosines[1], sines[1]))

    @property
    def _dtype(self) -> torch.dtype:
        return self.layers[0].tokens.k.dtype

    def _tensors(self) -> Iterator[Tensor]:
        for layer in self.layers:
            for slots in layer:
                yield from slots or ()

    @property
    def _rotates_summaries(self) -> bool:
        return "nsa" in self.config.attention and self.config.nsa.compress_rope == "after"


def _allocate_layer(
    config: "TransformerConfig", kind: "AttentionKind", capacity: int, slots: Callable[[int], TokenSlots]
) -> LayerTokens:
    if kind != "nsa":
        return LayerTokens(slots(min(capacity, config.sliding_window) if kind == "sliding" else capacity))
    nsa = config.nsa
    size = -(-capacity // nsa.select_block_size) * nsa.select_block_size
    return LayerTokens(
        tokens=slots(size),
        sliding=slots(min(nsa.window_size, size)) if nsa.kv_sharing == "separate" else None,
        pending=slots(nsa.compress_block_size),
        summaries=slots(size // nsa.compress_stride),
        started=_started(config, slots(nsa.compress_block_size // nsa.compress_stride)),
    )


def _started(config: "TransformerConfig", like: TokenSlots) -> StartedBlocks:
    """Empty sums, of keys and values as in `like`."""
    k, v = (torch.zeros_like(x, dtype=torch.float32) for x in like)
    kind, hidden = config.nsa.compression, config.nsa.compression_hidden_size
    widths = [{"mean": 0, "linear": x.shape[3], "mlp": hidden or x.shape[3]}[kind] for x in like]
    return StartedBlocks(k, v, *(k.new_zeros(*k.shape[:3], width) for width in widths))


def _completed_blocks(config: NSAConfig, start: int, end: int) -> range:
    """The compression blocks that are complete with the tokens before `end`, and were not with those before `start`."""
    first, last = (max((n - config.compress_block_size) // config.compress_stride + 1, 0) for n in (start, end))
    return range(first, last)
