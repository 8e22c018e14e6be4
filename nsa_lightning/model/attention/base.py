"""What every attention layer is and is given: one packed batch, new tokens of a cache, and the cache itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from nsa_kernels.decode.attention import NewTokens
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray
from torch import Tensor, nn

from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.joint_projection import JointProjection, outputs
from nsa_lightning.model.statistics import BranchStatistics

Rotary = tuple[Tensor, Tensor]  # cosines and sines, [T, R/2] each
Lengths = NDArray[np.int64]  # tokens of each document, [N]

# T packed tokens or new tokens of one sequence, B sequences, S slots for tokens, H query heads, H_kv KV heads, D_qk and
# D_v head dims.


class PackedContext(NamedTuple):
    """What every layer needs to know of the packed batch."""

    cu_seqlens: Tensor  # int32 [N + 1]
    max_seqlen: int
    rotary: Rotary  # of the positions of this rank's tokens
    parallel: ContextParallel = ContextParallel()  # the ranks that share the batch


class Chunk(NamedTuple):
    """Where new tokens of one sequence stand, for every layer."""

    row: int
    start: int  # position of the first new token
    stop: int  # position after the last one
    last: Tensor  # position of the last one, int64 []
    rotary: Rotary  # of the tokens


class Step(NamedTuple):
    """Where the new token of each sequence stands, for every layer; on the device alone."""

    positions: Tensor  # int32 [B]
    rotary: Rotary  # of the tokens
    rotary_at: dict[int, Rotary]  # of the positions so far from the tokens', by the `step_offsets` of the kinds


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


class CachedAttention(Protocol):
    """How `full` layers attend to what is cached; keys and values are views of the cache, to be read only."""

    def prefill(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend new tokens of one sequence to all of it, each to the tokens up to itself.

        A prompt comes in chunks, each with its own `start`; a sequence begins anew in its row at 0.

        Args:
            layer: index of the decoder layer.
            row: index of the sequence in the cache.
            start: position of the first new token.
            q: rotated queries of the new tokens, [T, H, D_qk].
            k: rotated keys of all tokens so far, the new ones' included, [L, H_kv, D_qk], L = start + T.
            v: values, [L, H_kv, D_v].

        Returns:
            [T, H, D_v].
        """

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attend one new token of each sequence to its own tokens. Rows that are idle come too.

        With CUDA graphs nothing may be read back to the host.

        Args:
            layer: index of the decoder layer.
            q: rotated queries, [B, H, D_qk].
            k: the cache's rotated keys, token t in slot t, the new one's included, [B, S, H_kv, D_qk]. Slots past a
                sequence's position are finite but mean nothing.
            v: values, [B, S, H_kv, D_v].
            positions: position of the new token in its sequence, int32 [B], on the device.

        Returns:
            [B, H, D_v].
        """


class LayerCache(Protocol):
    """What one layer keeps of the sequences that it continues; each attention kind has its own."""

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept, [B, S, …] each: a row a sequence, zeros where it is empty. S may grow with the capacity."""


class CacheRoom(NamedTuple):
    """What a layer's cache is made for."""

    layer: int  # index of the decoder layer
    capacity: int  # tokens of the longest sequence
    slots: Callable[[int], TokenSlots]  # empty ones of that number for every sequence
    dense_attention: CachedAttention  # of `full` layers


class Attended(NamedTuple):
    """What an attention layer adds to the residual stream."""

    out: Tensor  # [T, hidden_size]
    statistics: BranchStatistics | None = None  # of a layer that was told to watch


class FirstValues(NamedTuple):
    """How a parameter starts: normal numbers, or one number where the deviation is 0."""

    mean: float
    std: float


class AttentionLayer(nn.Module, ABC):
    """One attention layer; contexts, chunks and caches are those that its `AttentionKind` makes."""

    def __init__(self) -> None:
        super().__init__()
        self._joint: JointProjection | None = None

    @abstractmethod
    def maps(self) -> list[nn.Linear]:
        """The linear maps of the layer's input."""

    @abstractmethod
    def forward(self, x: Tensor, context: Any, watch: bool = False) -> Attended:
        """Attend packed documents to themselves, x [T, hidden_size]; gather statistics if `watch`.

        Where ranks share the batch, `context.parallel` exchanges tokens for heads and back.
        """

    @abstractmethod
    def prefill(self, x: Tensor, cache: Any, chunk: Any) -> Attended:
        """Append new tokens to one sequence of the cache and attend them to it, x [T, hidden_size]."""

    @abstractmethod
    def decode(self, x: Tensor, cache: Any, step: Step) -> Attended:
        """Append one token to each sequence of the cache and attend it to its own, x [B, hidden_size].

        Nothing is read back to the host, and shapes do not depend on positions: fit for a CUDA graph.
        """

    def join_projections(self) -> None:
        """Compute all maps of the input as one when decoding; they are not trained any more."""
        if self._joint is None or not self._joint.holds(self.maps()):
            self._joint = JointProjection(self.maps())

    def mapped(self, x: Tensor) -> Iterator[Tensor]:
        """The output of each of `maps`."""
        return iter(outputs(self._joint, self.maps(), x))

    def other_products(self, lengths: Lengths) -> int:
        """Products of weights outside of linear maps with numbers of documents of these lengths, in one forward."""
        return 0

    def first_values(self, part: str) -> FirstValues | None:
        """How a parameter starts, by its name within the layer; None where the decoder's rule holds."""
        return None

    def drawn_as(self, part: str) -> str:
        """The name within the layer by which a parameter's first numbers are drawn; of one name, they are equal."""
        return part

    def converted_value(self, part: str, gate_bias: float) -> Tensor | None:
        """How a parameter starts in a layer converted from a dense one; None where it starts as in any new model.

        Args:
            part: its name within the layer; the weights of the dense layer are not asked for.
            gate_bias: logit of an open gate.
        """
        return None
