"""In which order packed sequences are read: closed forms, so that any place of the stream is known without its past.

An order says for a sequence of an epoch which set it comes from, and which sequence of that set's plan it is. It
depends on its arguments alone, through whole numbers: no library version, worker or rank changes it.
"""

import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray

ORDER = "feistel-1"
"""Names the rule that orders training sequences: a run that was ordered by another one cannot be resumed."""

SLOTS = 10_000
"""Places of the table that shares sequences among the sets of a mixture: a share is exact to 1 / SLOTS."""

_MASK = 2**64 - 1


class Place(NamedTuple):
    """A sequence of one set's plan."""

    set_index: int
    sequence: int


class Order(Protocol):
    """The sequences of an endless stream, epoch by epoch."""

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""

    def place(self, epoch: int, sequence: int) -> Place:
        """Where a sequence of an epoch is found."""


class InTurn:
    """Every epoch is all of the first set in order, then the next: what is evaluated.

    Args:
        sizes: sequences of each set.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._ends = np.cumsum(sizes, dtype=np.int64)

    @property
    def num_sequences(self) -> int:
        """Sequences of all sets."""
        return int(self._ends[-1])

    def place(self, epoch: int, sequence: int) -> Place:
        """Where a sequence is found, in any epoch."""
        index = int(np.searchsorted(self._ends, sequence, side="right"))
        return Place(index, sequence - int(self._ends[index - 1] if index else 0))


class Shuffled:
    """Sets mixed by weight, each shuffled anew whenever it begins again: what is trained on.

    The m-th sequence that the stream takes from a set of S sequences is number m mod S of the set's pass m div S, and
    each pass is a permutation of its own: within a pass nothing is lost or doubled, though it may span epochs. An epoch
    is as long as it takes until every set has been seen in full; with one set it is one pass.

    Args:
        sizes: sequences of each set, 1 or more.
        weights: share of the sequences that comes from each set, by its name; they need not sum to 1.
        seed: of all permutations.

    Raises:
        ValueError: a weight is so small beside the others that its set would get no place among `SLOTS`.
    """

    def __init__(self, sizes: Sequence[int], weights: Mapping[str, float], seed: int) -> None:
        self._sizes = list(sizes)
        self._names = list(weights)
        self._seed = seed
        self._table = interleave(weights)  # [slots], whose slot it is
        self._slots = [np.flatnonzero(self._table == index) for index in range(len(sizes))]
        self._rank = np.zeros(len(self._table), dtype=np.int64)  # [slots], slots of the same set before it
        for slots in self._slots:
            self._rank[slots] = np.arange(len(slots))
        self.num_sequences = max(map(self._end_of_pass, range(len(sizes))))
        self._permutation: list[tuple[int, Permutation]] = [
            (0, self._permute(index, 0)) for index in range(len(sizes))
        ]  # the pass of each set that was last asked for

    def place(self, epoch: int, sequence: int) -> Place:
        """Where a sequence of an epoch is found."""
        turn, slot = divmod(epoch * self.num_sequences + sequence, len(self._table))
        index = int(self._table[slot])
        number, within = divmod(turn * len(self._slots[index]) + int(self._rank[slot]), self._sizes[index])
        if self._permutation[index][0] != number:
            self._permutation[index] = number, self._permute(index, number)
        return Place(index, self._permutation[index][1](within))

    def _end_of_pass(self, index: int) -> int:
        """Sequences of the stream until a set has been seen once."""
        turn, within = divmod(self._sizes[index] - 1, len(self._slots[index]))
        return turn * len(self._table) + int(self._slots[index][within]) + 1

    def _permute(self, index: int, number: int) -> "Permutation":
        name = self._names[index] if len(self._names) > 1 else ""
        return Permutation(self._sizes[index], f"{self._seed}\0{number}\0{name}")


class Permutation:
    """A pseudo-random permutation of range(size), any element of it in constant time and memory.

    A Feistel network over pairs (a, b) of a rectangle that hardly exceeds `size`: each round adds a hash of one
    coordinate to the other, which can be undone, so the rounds permute the rectangle; what they lead outside of the
    range is led on until it is inside (cycle walking), so the range is permuted too.

    Args:
        size: number of elements, 1 or more.
        key: any text; another key gives an unrelated permutation.
    """

    ROUNDS = 8

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._width = math.isqrt(size - 1) + 1
        self._height = -(-size // self._width)
        self._keys = struct.unpack(
            f"<{self.ROUNDS}Q", hashlib.blake2b(key.encode(), digest_size=8 * self.ROUNDS).digest()
        )

    def __call__(self, index: int) -> int:
        """Where the permutation takes `index`."""
        while True:
            a, b = divmod(index, self._width)
            for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
                a = (a + _mix(b ^ even)) % self._height
                b = (b + _mix(a ^ odd)) % self._width
            index = a * self._width + b
            if index < self.size:
                return index


def interleave(weights: Mapping[str, float]) -> NDArray[np.int64]:
    """A table of `SLOTS` places, whose set's index each; every set's places are spread evenly over it.

    A single set needs one place only.

    Raises:
        ValueError: a set would get no place.
    """
    if len(weights) == 1:
        return np.zeros(1, dtype=np.int64)
    exact = np.array(list(weights.values())) / math.fsum(weights.values()) * SLOTS
    counts = np.floor(exact).astype(np.int64)
    left = SLOTS - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:left]] += 1  # largest remainders first
    for (name, weight), count in zip(weights.items(), counts, strict=True):
        if count == 0:
            raise SettingError(
                f"data.mixture.{name}.weight must be at least 1/{SLOTS} of all weights together, "
                f"got {weight} of {math.fsum(weights.values())}"
            )
    owners = np.repeat(np.arange(len(counts)), counts)
    ranks = np.concatenate([np.arange(count) for count in counts])
    # Place k of n stands at (2k + 1) / 2n of the table, compared in whole numbers.
    return owners[np.lexsort((owners, (2 * ranks + 1) * 2**40 // counts[owners]))]


def _mix(value: int) -> int:
    """Hash 64 bits (the finalizer of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
