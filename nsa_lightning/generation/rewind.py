"""Back to where a sequence of a cache was: what a few more tokens write over is kept and put back."""

import torch
from torch import Tensor

from nsa_lightning.model.cached import Cache

_FEW = 64
"""Slots of what is kept whole: an NSA layer's tokens that are not summarised yet, and the sums of started blocks."""


class CacheMark:
    """The end of one sequence, to which `restore` takes it back after at most `num_tokens` more tokens.

    A layer that keeps the last tokens alone writes each in the slot of its position modulo its slots, over an older
    one: those are kept. What else tokens write lies behind the sequence, where nothing is read before it is written.

    Args:
        cache: of a model.
        row: the sequence.
        num_tokens: the most tokens that are appended before `restore`.
    """

    def __init__(self, cache: Cache, row: int, num_tokens: int) -> None:
        self._cache, self._row, self._length = cache, row, cache.host_lengths[row]
        end, device = self._length + num_tokens, cache.lengths.device
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []  # of a layer, slots in it, what they held
        for x in cache.tensors():
            size = x.shape[1]
            if size <= _FEW or end > size:
                first = end - size if size <= _FEW else max(self._length, end - size)
                slots = torch.arange(first, end, device=device) % size
                self._kept.append((x, slots, x[row, slots].clone()))

    def restore(self) -> None:
        """Forget the tokens since."""
        for x, slots, held in self._kept:
            x[self._row, slots] = held
        self._cache.host_lengths[self._row] = self._length
        self._cache.lengths[self._row].fill_(self._length)
