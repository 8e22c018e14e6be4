"""Batches of one split of one or more prepared sets, made where they are asked for: in a worker or in the training."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nsa_lightning.data.best_fit import BEST_FIT, BestFitPlan, write_plan
from nsa_lightning.data.order import Order
from nsa_lightning.data.packing import PackPlan, Row, SequentialPlan, pack_documents
from nsa_lightning.data.sets import Packing
from nsa_lightning.data.storage import writable
from nsa_lightning.data.token_store import TokenStore


class SequenceRange(NamedTuple):
    """Which sequences of which epoch make a batch."""

    epoch: int
    start: int
    stop: int
    max_seqlen: int  # of a piece of a document; longer ones are cut


class PackedSplit:
    """One split of a prepared set and the plan of its sequences. A process that is handed one opens it anew.

    Args:
        store: the prepared set.
        split: which of its splits.
        seq_len: tokens in a sequence.
        packing: how documents are laid in sequences.
        cache_dir: where the plans of best_fit are kept; one that is missing is made first.
    """

    def __init__(self, store: TokenStore, split: str, seq_len: int, packing: Packing, cache_dir: Path) -> None:
        self.store = store
        self.seq_len = seq_len
        self.tokens = store.split(split)
        self._arguments = store, split, seq_len, packing, cache_dir
        offsets = self.tokens.offsets
        self.plan: PackPlan
        if packing == "sequential":
            self.plan = SequentialPlan(offsets, seq_len)
            return
        name = f"{BEST_FIT}\0{store.fingerprint}\0{split}\0{seq_len}"
        path = cache_dir / f"plan-{hashlib.blake2b(name.encode(), digest_size=12).hexdigest()}"
        if not path.exists():
            _make_plan(path, offsets, seq_len)
        self.plan = BestFitPlan(path, offsets, seq_len)

    def __reduce__(self) -> tuple[type["PackedSplit"], tuple[Any, ...]]:
        return PackedSplit, self._arguments

    @property
    def num_padding(self) -> int:
        """Tokens that fill up sequences."""
        return self.plan.num_sequences * self.seq_len - self.tokens.num_tokens


class PackedDataset(Dataset[Tensor | SettingError]):
    """The batches of one or more splits, a few at a time as one tensor for `view_flats`, or why they cannot be read.

    Args:
        splits: where the sequences come from.
        order: which sequence comes when.
        byte_lengths: UTF-8 bytes of each token, int64 [vocab_size].
        padding: the token that fills what a sequence lacks.
    """

    def __init__(
        self, splits: Sequence[PackedSplit], order: Order, byte_lengths: NDArray[np.int64], padding: int
    ) -> None:
        self.splits = splits
        self.order = order
        self.seq_len = splits[0].seq_len
        self.byte_lengths = byte_lengths
        self.padding = padding

    @property
    def num_sequences(self) -> int:
        """Sequences in an epoch."""
        return self.order.num_sequences

    def row(self, epoch: int, sequence: int) -> Row | None:
        """A sequence of an epoch; None if it is past the epoch's end."""
        if sequence >= self.num_sequences:
            return None
        index, number = self.order.place(epoch, sequence)
        return Row(self.splits[index].tokens, self.splits[index].plan.pieces(number))

    def __getitem__(self, batches: Sequence[SequenceRange]) -> Tensor | SettingError:
        try:
            flats = [self._pack(batch) for batch in batches]
            packed = flats[0] if len(flats) == 1 else torch.cat(flats)
        except SettingError as error:  # raised in a worker its message would come wrapped in a traceback
            return error
        for split in self.splits:
            split.plan.release()
        return packed

    def _pack(self, batch: SequenceRange) -> Tensor:
        rows = [self.row(batch.epoch, sequence) for sequence in range(batch.start, batch.stop)]
        return pack_documents(rows, self.seq_len, self.byte_lengths, padding=self.padding, max_seqlen=batch.max_seqlen)


def _make_plan(path: Path, offsets: NDArray[np.int64], seq_len: int) -> None:
    """Write a plan, unless another process does; what one left that was killed is removed."""
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        acquired = FileLock(path.parent / "plans.lock").acquire()
    with acquired:
        for leftover in path.parent.glob(f"{path.name}.tmp-*"):
            shutil.rmtree(leftover)
        if not path.exists():
            write_plan(path, offsets, seq_len)
