"""Documents to packed sequences of exactly `seq_len` tokens: what stands where, and the batches made of it."""

import mmap
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nsa_lightning.data.batch import IGNORE_INDEX, allocate_flat, view_flat
from nsa_lightning.data.token_store import TokenSplit

# S sequences, N documents or pieces of documents, T = (sequences in a batch) · seq_len packed tokens.


class Pieces(NamedTuple):
    """The pieces of documents that make one sequence, in order; int64 [N] each."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]  # first token of the piece in its document
    stops: NDArray[np.int64]  # one past its last token


class PackPlan(Protocol):
    """Which pieces of documents make each sequence of a split. It says the same in every epoch, process and run."""

    @property
    def num_sequences(self) -> int:
        """Sequences of at most `seq_len` tokens."""

    def pieces(self, sequence: int) -> Pieces:
        """What stands in a sequence; where it is shorter than `seq_len`, the rest is padding."""

    def cut_documents(self) -> int:
        """How many documents stand in more than one sequence."""

    def release(self) -> None:
        """Give back the memory that reading the plan took."""


SEQUENTIAL = "sequential-2"
"""Names the rule of `SequentialPlan`: a run on data that another rule laid in sequences cannot be resumed."""


class SequentialPlan:
    """All documents laid end to end and cut every `seq_len` tokens: no padding but at the very end.

    A document that is cut continues in the next sequence as a piece of its own.

    Args:
        offsets: where each document begins, and the end of the last, int64 [N + 1].
        seq_len: tokens in a sequence.
    """

    def __init__(self, offsets: NDArray[np.int64], seq_len: int) -> None:
        self._offsets = offsets
        self._seq_len = seq_len
        self.num_sequences = -(-int(offsets[-1]) // seq_len)

    def pieces(self, sequence: int) -> Pieces:
        """What stands in a sequence. The last one may be shorter than `seq_len`."""
        begin = sequence * self._seq_len
        end = min(begin + self._seq_len, int(self._offsets[-1]))
        first = int(np.searchsorted(self._offsets, np.int64(begin), side="right")) - 1
        last = int(np.searchsorted(self._offsets, np.int64(end)))
        bounds = self._offsets[first : last + 1]
        starts, stops = np.maximum(bounds[:-1], begin), np.minimum(bounds[1:], end)
        return Pieces(np.arange(first, last), starts - bounds[:-1], stops - bounds[:-1])

    def cut_documents(self) -> int:
        """How many documents stand in more than one sequence."""
        stretches = range(0, len(self._offsets) - 1, 2**20)
        return sum(self._cut(self._offsets[start : start + 2**20 + 1]) for start in stretches)

    def release(self) -> None:
        """Give back the memory that reading the plan took."""
        release_pages(self._offsets)

    def _cut(self, bounds: NDArray[np.int64]) -> int:
        return int(np.count_nonzero(bounds[:-1] // self._seq_len != (bounds[1:] - 1) // self._seq_len))


def release_pages(array: NDArray[Any]) -> None:
    """Unmap what was read of a memory-mapped array; it stays in the system's cache and is mapped again when needed.

    Else a process that reads here and there comes to hold all of it.
    """
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)


class Row(NamedTuple):
    """One sequence of a batch: its pieces, and the split that has their tokens."""

    split: TokenSplit
    pieces: Pieces

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each piece."""
        return self.pieces.stops - self.pieces.starts

    def read(self) -> NDArray[np.int64]:
        """The tokens of all pieces."""
        return self.split.read(self._starts, self.lengths)

    def read_byte_counts(self) -> NDArray[np.int64] | None:
        """The bytes of text that each token stands for, if the set keeps them."""
        return self.split.read_byte_counts(self._starts, self.lengths) if self.split.has_byte_counts else None

    @property
    def _starts(self) -> NDArray[np.int64]:
        return self.split.offsets[self.pieces.documents] + self.pieces.starts


def pack_documents(
    rows: Sequence[Row | None],
    seq_len: int,
    byte_lengths: NDArray[np.int64],
    *,
    padding: int,
    max_seqlen: int,
) -> Tensor:
    """Lay the pieces of some sequences end to end.

    What a sequence lacks is filled with a document of `padding` that is not scored.

    Args:
        rows: the sequences; None for one that is all padding.
        seq_len: tokens in a sequence.
        byte_lengths: UTF-8 bytes of each token, int64 [vocab_size]; what the set keeps of its tokens comes first.
        padding: the token to fill with.
        max_seqlen: longer pieces are cut every so many tokens, into documents of their own.

    Returns:
        The batch, as `view_flat` reads it.
    """
    pieces = [_NONE if row is None else row.lengths for row in rows]
    lengths = [length for own in pieces for length in (own, [seq_len - own.sum()])]
    parts = _cut(np.concatenate(lengths), max_seqlen)
    flat = allocate_flat(len(rows) * seq_len, len(parts), max_seqlen)
    batch = view_flat(flat)
    tokens, targets, positions, cu_seqlens = (field.numpy() for field in batch[:4])
    cu_seqlens[0] = 0
    np.cumsum(parts, out=cu_seqlens[1:])
    np.subtract(np.arange(len(tokens)), np.repeat(cu_seqlens[:-1], parts), out=positions)
    tokens[:] = padding
    scored = np.zeros(len(tokens), dtype=bool)
    target_bytes = np.zeros(len(tokens), dtype=np.int64)
    for row, own, start in zip(rows, pieces, range(0, len(tokens), seq_len), strict=True):
        if row is not None:
            real = slice(start, start + int(own.sum()))
            tokens[real] = row.read()
            scored[real] = True
            counts = row.read_byte_counts()
            target_bytes[real] = byte_lengths[tokens[real]] if counts is None else counts
    scored[cu_seqlens[1:] - 1] = False
    targets[:] = IGNORE_INDEX
    np.copyto(targets[:-1], tokens[1:], where=scored[:-1])
    target_bytes[:-1] = target_bytes[1:]
    target_bytes[~scored] = 0
    np.add.reduceat(target_bytes, cu_seqlens[:-1], out=batch.target_bytes.numpy())
    return flat


_NONE = np.empty(0, dtype=np.int64)


def _cut(lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Cut each length into parts of at most `longest`; 0 has none."""
    lengths = lengths[lengths > 0]
    counts = -(-lengths // longest)
    parts = np.full(counts.sum(), longest)
    parts[np.cumsum(counts) - 1] = lengths - (counts - 1) * longest
    return parts
