"""Whole documents fitted together into sequences: best-fit-decreasing over groups of neighbours, many groups at once.

Documents longer than `seq_len` give as many whole sequences as they hold; what remains is packed like a document. A
group is what begins within `GROUP_SEQUENCES · seq_len` tokens of the split: the look-ahead is bounded, and every group
is packed by itself. Within it the longest item goes first, into the fullest sequence that still has room for it. Items
are documents, and bundles of those that are so short that fitting them one by one would not pay.

A plan takes seconds, so it is kept:

documents.bin  uint32 [N], uint64 in a set that needs it: documents, or what remains of them, sequence after sequence
bounds.bin     int64 [P + 1]: packed sequence i has documents[bounds[i]:bounds[i + 1]]
long.bin       int64 [M + 1, 2]: documents that fill whole sequences, and how many of those stand before each
"""

# S sequences: P packed ones, then those that a piece of a long document fills. N packed documents, M long ones.
# G groups in a chunk, I items of the largest.

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray

from nsa_lightning.data.packing import Pieces, release_pages
from nsa_lightning.data.storage import whole_directory

BEST_FIT = "best_fit-1"
"""Names the rule that lays documents in sequences: a plan made by another one is not used."""

GROUP_SEQUENCES = 256
CHUNK_GROUPS = 128
CHUNK_DOCUMENTS = 2**21
BUNDLE = 64
"""Documents up to 1 / BUNDLE of a sequence are bundled until they fill about as much."""


class BestFitPlan:
    """Whole documents fitted together; only those longer than `seq_len` are cut. Read from what `write_plan` wrote.

    Args:
        path: the plan's directory.
        offsets: where each document begins, and the end of the last, int64 [N + 1].
        seq_len: tokens in a sequence.

    Raises:
        ValueError: the plan cannot be read.
    """

    def __init__(self, path: Path, offsets: NDArray[np.int64], seq_len: int) -> None:
        self._offsets, self._seq_len = offsets, seq_len
        try:
            self._bounds = np.memmap(path / "bounds.bin", np.int64, "r")
            self._documents = np.memmap(path / "documents.bin", _document_type(offsets), "r")
            self._long = np.memmap(path / "long.bin", np.int64, "r").reshape(-1, 2)
            if len(self._documents) != self._bounds[-1] + 1:
                raise SettingError(f"{path / 'documents.bin'} must have {self._bounds[-1] + 1} documents")
        except (OSError, ValueError) as error:
            raise SettingError(f"the plan {path} cannot be read: {error}; delete it and run again") from error
        self._num_packed = len(self._bounds) - 1
        self.num_sequences = self._num_packed + int(self._long[-1, 1])

    def pieces(self, sequence: int) -> Pieces:
        """What stands in a sequence; where it is shorter than `seq_len`, the rest is padding."""
        if sequence >= self._num_packed:
            return self._whole(sequence - self._num_packed)
        begin, end = self._bounds[sequence : sequence + 2]
        documents = self._documents[begin:end].astype(np.int64)
        stops = self._offsets[documents + 1] - self._offsets[documents]
        return Pieces(documents, stops // self._seq_len * self._seq_len, stops)

    def cut_documents(self) -> int:
        """How many documents stand in more than one sequence."""
        documents = self._long[:-1, 0]
        return int(np.count_nonzero(self._offsets[documents + 1] - self._offsets[documents] > self._seq_len))

    def release(self) -> None:
        """Give back the memory that reading the plan took."""
        for array in (self._offsets, self._bounds, self._documents, self._long):
            release_pages(array)

    def _whole(self, number: int) -> Pieces:
        index = int(np.searchsorted(self._long[:, 1], np.int64(number), side="right")) - 1
        document, before = self._long[index]
        start = (np.array([number]) - before) * self._seq_len
        return Pieces(np.array([document]), start, start + self._seq_len)


def write_plan(path: Path, offsets: NDArray[np.int64], seq_len: int) -> None:
    """Pack a split and keep the plan in a directory, which appears when it is whole; a bar shows how far it is.

    Raises:
        ValueError: the plan cannot be written.
    """
    with whole_directory(path) as folder, ExitStack() as stack:
        bounds, documents, long = (
            stack.enter_context((folder / f"{name}.bin").open("wb")) for name in ("bounds", "documents", "long")
        )
        num_documents, num_whole, end = len(offsets) - 1, 0, 0
        bounds.write(np.int64(0).tobytes())  # not tofile, which does not tell of a full disk
        for packed in pack_best_fit(offsets, seq_len):
            documents.write(packed.documents.astype(_document_type(offsets)).tobytes())
            bounds.write((end + np.cumsum(packed.sizes)).tobytes())
            end += len(packed.documents)
            long.write(np.stack([packed.long, num_whole + np.cumsum(packed.whole) - packed.whole], axis=1).tobytes())
            num_whole += int(packed.whole.sum())
        # Ends: an empty file cannot be mapped.
        documents.write(np.array(num_documents, dtype=_document_type(offsets)).tobytes())
        long.write(np.array([num_documents, num_whole]).tobytes())


def _document_type(offsets: NDArray[np.int64]) -> type[np.unsignedinteger[Any]]:
    return np.uint32 if len(offsets) <= 2**32 else np.uint64


class Packed(NamedTuple):
    """The sequences of some neighbouring documents."""

    documents: NDArray[np.int64]  # that are packed, in the order of the sequences
    sizes: NDArray[np.int64]  # how many of them each sequence has
    long: NDArray[np.int64]  # documents that fill whole sequences
    whole: NDArray[np.int64]  # how many sequences each of those fills


def pack_best_fit(offsets: NDArray[np.int64], seq_len: int) -> Iterator[Packed]:
    """Cut whole sequences off long documents and pack what remains, a chunk of groups at a time.

    Args:
        offsets: where each document begins, and the end of the last, int64 [N + 1].
        seq_len: tokens in a sequence.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    group_tokens, num_documents, start = GROUP_SEQUENCES * seq_len, len(offsets) - 1, 0
    title = f"plan sequences of {seq_len}"
    with tqdm(total=num_documents, desc=title, unit="documents", unit_scale=True, delay=1, disable=None) as bar:
        while start < num_documents:
            stop = _chunk_end(offsets, start, group_tokens)
            ends = np.asarray(offsets[start : stop + 1])
            whole, rest = np.divmod(np.diff(ends), seq_len)
            kept, long = np.flatnonzero(rest), np.flatnonzero(whole)
            sequence = _pack_groups(rest[kept], ends[kept] // group_tokens, seq_len)
            order = np.argsort(sequence, kind="stable")
            yield Packed(start + kept[order], np.bincount(sequence), start + long, whole[long])
            bar.update(stop - start)
            start = stop


def _chunk_end(offsets: NDArray[np.int64], start: int, group_tokens: int) -> int:
    """The end of a chunk of whole groups: at most CHUNK_GROUPS, and about CHUNK_DOCUMENTS where groups are as small."""
    group = offsets[start] // group_tokens
    last = offsets[min(start + CHUNK_DOCUMENTS, len(offsets) - 1)] // group_tokens
    end = min(max(last, group + 1), group + CHUNK_GROUPS)
    return min(int(np.searchsorted(offsets, np.int64(end * group_tokens))), len(offsets) - 1)


def _pack_groups(lengths: NDArray[np.int64], groups: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The sequence that each document goes to, numbered without gaps, int64 [N]."""
    if not len(lengths):
        return lengths
    item, lengths, groups = _bundle(lengths, groups, seq_len)
    groups = _without_gaps(groups)
    order = np.lexsort((-lengths, groups))
    sizes = np.bincount(groups)
    within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    needs = np.zeros((sizes.max(), len(sizes)), dtype=np.int32)  # [I, G], descending, 0 where a group has no more
    needs[within, groups[order]] = lengths[order]
    bins = _best_fit_decreasing(needs, seq_len)  # [I, G]
    chosen = np.empty(len(order), dtype=np.int64)
    chosen[order] = groups[order] * (bins.max() + 1) + bins[within, groups[order]]
    return _without_gaps(chosen)[item]


def _without_gaps(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number anew from 0 in the same order, leaving out what does not occur."""
    first = numbers.min()
    occurs = np.bincount(numbers - first) > 0
    return (np.cumsum(occurs) - 1)[numbers - first]


def _bundle(
    lengths: NDArray[np.int64], groups: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Join runs of short documents of a group: the item of each document, and the length and group of each item."""
    short = lengths <= seq_len // BUNDLE
    cells = np.cumsum(lengths[short]) // max(seq_len // BUNDLE, 1)
    begins = np.diff(cells, prepend=-1).astype(bool) | np.diff(groups[short], prepend=-1).astype(bool)
    num_bundles, num_long = int(begins.sum()), len(short) - len(begins)
    item = np.empty(len(lengths), dtype=np.int64)
    item[short] = np.cumsum(begins) - 1
    item[~short] = num_bundles + np.arange(num_long)
    item_groups = np.concatenate([groups[short][begins], groups[~short]])
    return item, np.bincount(item, weights=lengths).astype(np.int64), item_groups


def _best_fit_decreasing(needs: NDArray[np.int32], seq_len: int) -> NDArray[np.int32]:
    """Place the i-th item of every group at once, one i after another: the bin of each item, int32 [I, G]."""
    capacity = 2 * int(-(-needs.sum(axis=0, dtype=np.int64).max() // seq_len)) + 1
    num_groups = needs.shape[1]
    rows = np.arange(num_groups)
    room = np.full((num_groups, capacity), seq_len, dtype=np.int32)
    left = np.empty_like(room)
    bins = np.empty(needs.shape, dtype=np.int32)
    opened = 0
    for step, need in enumerate(needs):
        stop = opened + 1  # of the bins that no group has opened one is enough
        np.subtract(room[:, :stop], need[:, None], out=left[:, :stop])
        # As unsigned numbers the negative ones, where it does not fit, are larger than any room.
        best = left[:, :stop].view(np.uint32).argmin(axis=1)
        room[rows, best] -= need
        bins[step] = best
        opened = max(opened, int(best.max()) + 1)
    return bins
