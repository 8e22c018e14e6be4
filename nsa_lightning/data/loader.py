"""Batches of one rank, handed out by workers, and the place in the training data that a checkpoint keeps."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.data.packing import PackedDataset, SequenceRange


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
        self._sampler = _RankSampler(self.num_sequences, batch_size, rank, world_size)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._loader: DataLoader[PackedBatch] | None = None

    def __len__(self) -> int:
        return self._batches_from(0)

    def __iter__(self) -> Iterator[PackedBatch]:
        return self._stream(epoch=0, start=0)

    def close(self) -> None:
        """End the workers; the next pass starts new ones."""
        self._loader = None

    def _batches_from(self, sequence: int) -> int:
        return -(-(self.num_sequences - sequence) // self.global_batch)

    def _stream(self, epoch: int, start: int) -> Iterator[PackedBatch]:
        self._sampler.epoch, self._sampler.start = epoch, start
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
        yield from self._loader


class ResumableLoader(PackedLoader):
    """An endless stream of shuffled epochs whose place is kept: every pass goes on where the last one stopped.

    The place moves when a batch is handed out, not when a worker makes it, and counts sequences of all ranks: a run may
    go on with another number of ranks, workers or sequences in a batch.

    Args:
        dataset: the split.
        fingerprint: what the order of the data depends on, by the name of its setting.
        epoch: the epoch to begin with.
        options: those of `PackedLoader`.
    """

    def __init__(
        self, dataset: PackedDataset, *, fingerprint: dict[str, str | int | float], epoch: int = 0, **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.fingerprint = fingerprint
        self.epoch = epoch
        self.consumed = 0  # sequences of this epoch that all ranks together were handed
        self.batches = 0  # that this pass has handed out, before a stop included
        self._handed_out = False  # anything since its place was loaded

    def __len__(self) -> int:
        """Batches of this pass, as Lightning counts them: those before a stop and those that are left."""
        return self.batches + self._batches_from(self.consumed)

    def __iter__(self) -> Iterator[PackedBatch]:
        # Eager, for Lightning asks for the length between `iter` and the first batch. It may also call `iter` more than
        # once before it takes a batch: that must change nothing.
        if self.consumed >= self.num_sequences:
            self.epoch, self.consumed, self.batches = self.epoch + 1, 0, 0
        elif self._handed_out:
            self.batches = 0
        return self._count()

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream, in plain types, the same on every rank."""
        place = {"epoch": self.epoch, "consumed": self.consumed, "batches": self.batches}
        return {**place, "fingerprint": dict(self.fingerprint)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place in the stream.

        Raises:
            ValueError: the place was noted in a stream of other data or of another order.
        """
        for name, value in self.fingerprint.items():
            before = state["fingerprint"].get(name)
            if before != value:
                raise ValueError(
                    f"{name} must stay as it was to resume: the checkpoint was trained with {before}, now it is {value}"
                )
        self.epoch, self.consumed, self.batches = state["epoch"], state["consumed"], state["batches"]
        self._handed_out = False

    def _count(self) -> Iterator[PackedBatch]:
        for batch in self._stream(self.epoch, self.consumed):
            self.consumed = min(self.consumed + self.global_batch, self.num_sequences)
            self.batches += 1
            self._handed_out = True
            yield batch


class _RankSampler(Sampler[SequenceRange]):
    """Which sequences one rank reads, from a place in an epoch to the epoch's end."""

    def __init__(self, num_sequences: int, batch_size: int, rank: int, world_size: int) -> None:
        self.num_sequences = num_sequences
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0

    def __iter__(self) -> Iterator[SequenceRange]:
        epoch, size = self.epoch, self.batch_size
        firsts = range(self.start + self.rank * size, self.num_sequences + self.rank * size, self.world_size * size)
        return (SequenceRange(epoch, first, first + size) for first in firsts)


def _as_is(batch: Any) -> Any:
    return batch
