"""Back to where a sequence of a cache was: what a few more tokens write over is kept and put back."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lightning.model.cached import Cache, TokenSlots


class _Kept(NamedTuple):
    """Slots of one row, and what they held."""

    slots: TokenSlots
    places: Tensor  # int64 [slots that are written]
    k: Tensor
    v: Tensor


class CacheMark:
    """The end of one sequence, to which `restore` takes it back after at most `num_tokens` more tokens.

    Args:
        cache: of a model.
        row: the sequence.
        num_tokens: the most tokens that are appended before `restore`.
    """

    def __init__(self, cache: Cache, row: int, num_tokens: int) -> None:
        self._cache, self._row, self._length = cache, row, cache.host_lengths[row]
        self._kept = [
            _Kept(slots, places, slots.k[row, places].clone(), slots.v[row, places].clone())
            for slots, places in self._written(num_tokens)
        ]
        started = (sums for layer in cache.layers for sums in layer.started or ())
        self._started = [(sums, sums[row].clone()) for sums in started]

    def restore(self) -> None:
        """Forget the tokens since; what lies behind the sequence in the cache is as it was, too."""
        for kept in self._kept:
            kept.slots.k[self._row, kept.places] = kept.k
            kept.slots.v[self._row, kept.places] = kept.v
        for sums, value in self._started:
            sums[self._row] = value
        self._cache.host_lengths[self._row] = self._length
        self._cache.lengths[self._row].fill_(self._length)

    def _written(self, num_tokens: int) -> Iterator[tuple[TokenSlots, Tensor]]:
        """The slots that so many tokens write to, by layer and kind."""
        stride, end = self._cache.config.nsa.compress_stride, self._length + num_tokens
        for layer in self._cache.layers:
            for slots in (layer.tokens, layer.sliding, layer.pending):
                if slots is not None:
                    yield slots, self._places(self._length, end, slots.size)
            if layer.summaries is not None:  # block i is complete with the token that ends it, after i strides
                first = max(self._length - self._cache.config.nsa.compress_block_size, 0) // stride
                yield layer.summaries, self._places(first, end // stride + 1, layer.summaries.size)

    def _places(self, start: int, end: int, size: int) -> Tensor:
        return torch.arange(max(start, end - size), end, device=self._cache.lengths.device) % size
