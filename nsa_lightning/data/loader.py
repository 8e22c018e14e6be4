"""Batches of one rank, handed out by workers, and the place in the training data that a checkpoint keeps."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from nsa_kernels.errors import SettingError
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from nsa_lightning.data.batch import PackedBatch, view_flats
from nsa_lightning.data.dataset import PackedDataset, SequenceRange

TOKENS_AT_ONCE = 2**16
"""What a worker sends at least, in as many batches as that takes: each message costs about a millisecond."""


class PackedLoader:
    """The batches of one rank, one pass over a split at a time, always in the same order.

    It wraps a DataLoader and is none itself, so Lightning puts no sampler of its own in: `batch_size` sequences go to
    each rank in turn. Where the number of sequences is not a multiple of `world_size · batch_size` the last batches are
    filled up with tokens that are not scored, so each rank has the same number of batches.

    Args:
        dataset: the split.
        batch_size: sequences in a batch.
        rank: which share of each global batch is read here.
        world_size: number of such shares.
        num_workers: processes that make batches; 0 makes them in this one.
        pin_memory: put batches into page-locked memory, for a GPU.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        self.num_sequences = dataset.num_sequences
        self.global_batch = world_size * batch_size
        self._sampler = _RankSampler(self, rank * batch_size, batch_size)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._loader: DataLoader[Tensor | SettingError] | None = None

    def __len__(self) -> int:
        return self._batches_from(0)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self._stream(epoch=0, start=0, batches=0)

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        self._loader = None

    def max_seqlen(self, index: int) -> int:
        """The longest piece of a document in a batch, by the batch's number in its stream; longer ones are cut."""
        return self.dataset.seq_len

    def _batches_from(self, sequence: int) -> int:
        return -(-(self.num_sequences - sequence) // self.global_batch)

    def _stream(self, epoch: int, start: int, batches: int) -> Iterator[PackedBatch]:
        self._sampler.epoch, self._sampler.start, self._sampler.batches = epoch, start, batches
        if self._loader is None:
            self._loader = DataLoader(
                self.dataset,
                batch_size=None,  # the dataset makes whole batches
                sampler=self._sampler,
                num_workers=self._num_workers,
                collate_fn=_as_is,
                pin_memory=self._pin_memory,
                persistent_workers=self._num_workers > 0,
            )
        for flats in self._loader:
            if isinstance(flats, SettingError):
                raise flats
            yield from view_flats(flats)


class ResumableLoader(PackedLoader):
    """An endless stream of shuffled epochs whose place is kept: every pass goes on where the last one stopped.

    The place moves when a batch is handed out, not when a worker makes it, and counts sequences of all ranks: a run may
    go on with another number of ranks, workers or sequences in a batch.

    A pass ends with its epoch, or where it is limited after so many batches, in the middle of an epoch: so all of them
    have as many, and a run that resumes takes the steps of one that was never stopped.

    Args:
        dataset: the split.
        fingerprint: what the order of the data depends on, by the name of its setting.
        epoch: the epoch to begin with.
        curriculum: by optimizer step, from which on it holds, the longest piece of a document in tokens.
        accumulate: batches in an optimizer step.
        limit: batches in a pass, or their share of an epoch's if it is a float, as trainer.limit_train_batches.
        options: those of `PackedLoader`.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        fingerprint: Mapping[str, str | int | float],
        epoch: int = 0,
        curriculum: Mapping[int, int] | None = None,
        accumulate: int = 1,
        limit: int | float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dataset, **options)
        self.fingerprint = dict(fingerprint)
        self.epoch = epoch
        self.consumed = 0  # sequences of this epoch that all ranks together were handed
        self.batches = 0  # that this pass has handed out, before a stop included
        self.steps = 0  # optimizer steps before this pass
        self._curriculum = sorted((curriculum or {}).items(), reverse=True)
        self._accumulate = accumulate
        whole = self._batches_from(0)
        least = limit if isinstance(limit, int) else int(whole * limit)
        self._limit = least if least < whole else None
        self._handed_out = False  # anything since its place was loaded

    def __len__(self) -> int:
        """Batches of this pass, as Lightning counts them: those before a stop and those that are left.

        Where passes are limited, those of an epoch: Lightning applies the limit itself, once for all passes.
        """
        if self._limit is not None:
            return self._batches_from(0)
        return self.batches + self._batches_from(self.consumed)

    def __iter__(self) -> Iterator[PackedBatch]:
        # Eager, for Lightning asks for the length between `iter` and the first batch. It may also call `iter` more than
        # once before it takes a batch: that must change nothing.
        ended = self.consumed >= self.num_sequences if self._limit is None else self.batches >= self._limit
        if ended or self._handed_out:
            self._begin_pass()
        return self._count()

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, in plain types, the same on every rank."""
        place = {name: getattr(self, name) for name in _PLACE}
        return {**place, "accumulate": self._accumulate, "fingerprint": dict(self.fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the stream.

        Raises:
            ValueError: the place was noted in a stream of other data or of another order.
        """
        before = state["fingerprint"]
        for name in [*self.fingerprint, *(before.keys() - self.fingerprint.keys())]:
            old, new = (values.get(name, "unset") for values in (before, self.fingerprint))
            if old != new:
                raise SettingError(
                    f"{name} must stay as it was to resume: the checkpoint was trained with {old}, now it is {new}"
                )
        for name in _PLACE:
            setattr(self, name, state[name])
        self.steps += self.batches // state["accumulate"] - self.batches // self._accumulate
        self._handed_out = False

    def max_seqlen(self, index: int) -> int:
        """The longest piece of a document in a batch of this pass: what the curriculum says at its optimizer step."""
        step = self.steps + index // self._accumulate
        return next((length for begin, length in self._curriculum if begin <= step), self.dataset.seq_len)

    def _begin_pass(self) -> None:
        self.steps += -(-self.batches // self._accumulate)  # the last step of a pass may have fewer batches
        self.batches = 0
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self.consumed >= self.num_sequences:
            self.epoch, self.consumed = self.epoch + 1, 0

    def _count(self) -> Iterator[PackedBatch]:
        while True:
            for batch in self._stream(self.epoch, self.consumed, self.batches):
                self.consumed = min(self.consumed + self.global_batch, self.num_sequences)
                self.batches += 1
                self._handed_out = True
                yield batch
                if self.batches == self._limit:
                    return
            if self._limit is None:
                return
            self._end_epoch()


_PLACE = ("epoch", "consumed", "batches", "steps")


class _RankSampler(Sampler[list[SequenceRange]]):
    """Which batches one rank reads, from a place in an epoch to the epoch's end, and which a worker sends at once."""

    def __init__(self, loader: PackedLoader, first: int, batch_size: int) -> None:
        self.loader = loader
        self.first = first
        self.batch_size = batch_size
        self.epoch = 0
        self.start = 0
        self.batches = 0

    def __iter__(self) -> Iterator[list[SequenceRange]]:
        epoch, size, loader = self.epoch, self.batch_size, self.loader
        firsts = range(self.start + self.first, loader.num_sequences + self.first, loader.global_batch)
        batches = enumerate(firsts, start=self.batches)
        ranges = (SequenceRange(epoch, first, first + size, loader.max_seqlen(index)) for index, first in batches)
        at_once = max(1, TOKENS_AT_ONCE // (size * loader.dataset.seq_len))
        return iter(lambda: list(islice(ranges, at_once)), [])


def _as_is(batch: Any) -> Any:
    return batch
