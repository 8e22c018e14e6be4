"""Documents to packed sequences of exactly `seq_len` tokens: what stands where, and the batches made of it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.token_store import TokenStore

# S sequences, N documents or pieces of documents, T = (sequences in a batch) · seq_len packed tokens.


class Pieces(NamedTuple):
    """The pieces of documents that make one sequence, in order; int64 [N] each."""

    documents: NDArray[np.int64]
    starts: NDArray[np.int64]  # first token of the piece in its document
    stops: NDArray[np.int64]  # one past its last token


class PackPlan:
    """One epoch over some documents: laid end to end and cut every `seq_len` tokens.

    A document that is cut continues in the next sequence as a piece of its own. The order depends on `seed` and `epoch`
    alone, and with neither it is the order of `documents`.

    Args:
        offsets: where each document of the store begins, and the end of the last, int64.
        documents: which of them to pack, int64 [N].
        seq_len: tokens in a sequence.
        order: (seed, epoch) to shuffle by; None keeps the order.
    """

    def __init__(
        self,
        offsets: NDArray[np.int64],
        documents: NDArray[np.int64],
        seq_len: int,
        order: tuple[int, int] | None = None,
    ) -> None:
        self._offsets = offsets
        self._documents = documents if order is None else documents[_permutation(len(documents), *order)]
        ends = np.cumsum(self._lengths(self._documents))
        self.seq_len = seq_len
        self.num_sequences = -(-int(ends[-1]) // seq_len)
        cuts = np.arange(self.num_sequences) * seq_len
        first = np.searchsorted(ends, cuts, side="right")
        skipped = cuts - np.where(first > 0, ends[first - 1], 0)
        self._first = np.append(first, len(documents))  # [S + 1], place in the order where a sequence begins
        self._skipped = np.append(skipped, 0)  # [S + 1], tokens of that document that came in sequences before

    def pieces(self, sequence: int) -> Pieces:
        """What stands in a sequence. The last one may be shorter than `seq_len`."""
        head, tail = self._skipped[sequence], self._skipped[sequence + 1]
        documents = self._documents[self._first[sequence] : self._first[sequence + 1] + (tail > 0)]
        starts = np.zeros(len(documents), dtype=np.int64)
        starts[0] = head
        stops = self._lengths(documents)
        if tail > 0:
            stops[-1] = tail
        return Pieces(documents, starts, stops)

    def _lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._offsets[documents + 1] - self._offsets[documents]


def _permutation(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Sort by the raw stream of a counter-based generator: no library version may change the order."""
    keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(size)
    return np.argsort(keys, kind="stable")


def pack_documents(
    store: TokenStore,
    plan: PackPlan,
    sequences: Iterable[int],
    byte_lengths: NDArray[np.int64],
    padding: int,
) -> PackedBatch:
    """Lay the pieces of some sequences end to end.

    What the plan lacks, the end of its last sequence and any sequence after that, is filled with documents of
    `padding` that are not scored.

    Args:
        store: where the tokens are.
        plan: which pieces make a sequence.
        sequences: numbers of the sequences, ascending.
        byte_lengths: UTF-8 bytes of each token, int64 [vocab_size].
        padding: the token to fill with.
    """
    numbers = list(sequences)
    pieces = [plan.pieces(number) for number in numbers if number < plan.num_sequences]
    starts = np.concatenate([store.offsets[piece.documents] + piece.starts for piece in pieces] or [_NONE])
    lengths = np.concatenate([piece.stops - piece.starts for piece in pieces] or [_NONE])
    num_tokens, num_real = len(numbers) * plan.seq_len, int(lengths.sum())
    short = len(pieces) * plan.seq_len - num_real  # of the plan's last sequence
    fill = [short] * (short > 0) + [plan.seq_len] * (len(numbers) - len(pieces))
    lengths = np.append(lengths, fill).astype(np.int64)
    offsets = np.append(0, np.cumsum(lengths))  # [N + 1]
    positions = np.arange(num_tokens) - np.repeat(offsets[:-1], lengths)

    tokens = np.full(num_tokens, padding, dtype=np.int64)
    tokens[:num_real] = store.tokens[positions[:num_real] + np.repeat(starts, lengths[: len(starts)])]
    targets = np.append(tokens[1:], IGNORE_INDEX)
    targets[offsets[1:] - 1] = IGNORE_INDEX
    targets[num_real:] = IGNORE_INDEX
    num_bytes = byte_lengths[tokens[:num_real]].sum() - byte_lengths[tokens[offsets[: len(starts)]]].sum()
    return PackedBatch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        max_seqlen=plan.seq_len,
        target_bytes=torch.tensor(num_bytes, dtype=torch.int64),
    )


_NONE = np.empty(0, dtype=np.int64)


class SequenceRange(NamedTuple):
    """Which sequences of which epoch make a batch."""

    epoch: int
    start: int
    stop: int


class PackedDataset(Dataset[PackedBatch]):
    """The batches of one split; each process plans an epoch when it is first asked for a batch of it.

    Args:
        store: where the tokens are.
        split: which of its documents.
        seq_len: tokens in a sequence.
        seed: shuffles the documents anew each epoch; None keeps their order.
        byte_lengths: UTF-8 bytes of each token, int64 [vocab_size].
        padding: the token that fills the last sequence.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        *,
        seq_len: int,
        seed: int | None,
        byte_lengths: NDArray[np.int64],
        padding: int,
    ) -> None:
        self.store = store
        self.split = split
        self.seq_len = seq_len
        self.seed = seed
        self.byte_lengths = byte_lengths
        self.padding = padding
        self._plan: tuple[int, PackPlan] | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        return -(-self.store.manifest.splits[self.split].tokens // self.seq_len)

    def plan(self, epoch: int) -> PackPlan:
        """What stands where in an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            order = None if self.seed is None else (self.seed, epoch)
            documents = self.store.documents(self.split)
            self._plan = epoch, PackPlan(self.store.offsets, documents, self.seq_len, order)
        return self._plan[1]

    def __getitem__(self, key: SequenceRange) -> PackedBatch:
        sequences = range(key.start, key.stop)
        return pack_documents(self.store, self.plan(key.epoch), sequences, self.byte_lengths, self.padding)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_plan": None}
