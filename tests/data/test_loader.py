import json
import os
import pickle
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.data.dataset import PackedDataset, PackedSplit, SequenceRange
from nsa_lightning.data.loader import PackedLoader, ResumableLoader
from nsa_lightning.data.order import InTurn, Shuffled
from nsa_lightning.data.packing import Row, SequentialPlan, pack_documents
from nsa_lightning.data.sets import Packing
from nsa_lightning.data.token_store import TokenStore

BYTE_LENGTHS = np.ones(4096, dtype=np.int64)
FINGERPRINT: dict[str, str | int | float] = {"data.seq_len": 8, "data.seed": 3}
LENGTHS = [7, 30, 3, 1, 12, 55, 9, 20, 4, 16]  # 157 tokens: 20 sequences, the last one short
SIZES = st.integers(1, 4)
SHAPES = st.tuples(SIZES, SIZES)  # ranks, sequences in a batch
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Sequences = list[tuple[int, ...]]


@pytest.fixture
def make_dataset(make_store: Callable[..., TokenStore], tmp_path: Path) -> Callable[..., PackedDataset]:
    """The training split of one store, or of two that are mixed."""

    def make(packing: Packing = "sequential", mixed: bool = False) -> PackedDataset:
        stores = [make_store(LENGTHS, num_shards=2), *([make_store([6, 33, 2, 9])] if mixed else [])]
        splits = [PackedSplit(store, "train", 8, packing, tmp_path / "cache") for store in stores]
        weights = dict(zip("ab", (2.0, 1.0), strict=False)) if mixed else {"": 1.0}
        order = Shuffled([split.plan.num_sequences for split in splits], weights, seed=3)
        return PackedDataset(splits, order, BYTE_LENGTHS, padding=0)

    return make


@pytest.fixture
def dataset(make_dataset: Callable[..., PackedDataset]) -> PackedDataset:
    return make_dataset()


@pytest.fixture(params=["sequential", "best_fit", "sequential mixture", "best_fit mixture"])
def any_dataset(make_dataset: Callable[..., PackedDataset], request: pytest.FixtureRequest) -> PackedDataset:
    packing, *mixed = request.param.split()
    return make_dataset(packing, bool(mixed))


def resumable(dataset: PackedDataset, **options: Any) -> ResumableLoader:
    return ResumableLoader(dataset, fingerprint=FINGERPRINT, **{"batch_size": 1, **options})


def sequences(batches: Iterable[PackedBatch]) -> Sequences:
    """Each sequence of some batches, by its tokens."""
    return [tuple(row) for batch in batches for row in batch.tokens.view(-1, 8).tolist()]


def is_padding(sequence: tuple[int, ...]) -> bool:
    return set(sequence) == {0}


def epoch_of(dataset: PackedDataset, epoch: int) -> Sequences:
    loader = PackedLoader(dataset, batch_size=1)
    return sequences(loader._stream(epoch, 0, 0))


def take_passes(loaders: list[ResumableLoader], count: int) -> list[PackedBatch]:
    """`count` batches of every rank, pass after pass as a trainer takes them, in the order of the global stream."""
    taken: list[PackedBatch] = []
    while count > 0:
        steps = list(islice(zip(*loaders, strict=True), count))
        assert steps, "a pass without a batch"
        taken += [batch for ranks in steps for batch in ranks]
        count -= len(steps)
    return taken


def ranks_of(dataset: PackedDataset, world_size: int, batch_size: int, **options: Any) -> list[ResumableLoader]:
    options = {"world_size": world_size, "batch_size": batch_size, **options}
    return [resumable(dataset, rank=rank, **options) for rank in range(world_size)]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_change_nothing(dataset: PackedDataset, num_workers: int) -> None:
    loader = resumable(dataset, num_workers=num_workers, batch_size=3)
    passes = [sequences(loader) for _ in range(3)]
    loader.close()
    expected = [[*epoch_of(dataset, epoch), (0,) * 8] for epoch in range(3)]
    assert passes == expected
    assert len({tuple(each) for each in passes}) == 3


def test_a_plain_loader_repeats_one_order(dataset: PackedDataset) -> None:
    loader = PackedLoader(dataset, batch_size=2, num_workers=1)
    next(iter(loader))  # a pass that is left off does not move the next one
    assert sequences(loader) == sequences(loader) == epoch_of(dataset, 0)
    assert len(loader) == 10
    loader.close()


@FEW
@given(shape=SHAPES)
def test_ranks_share_an_epoch_and_have_as_many_batches(any_dataset: PackedDataset, shape: tuple[int, int]) -> None:
    world_size, batch_size = shape
    ranks = [
        PackedLoader(any_dataset, rank=rank, world_size=world_size, batch_size=batch_size) for rank in range(world_size)
    ]
    batches = [list(loader) for loader in ranks]
    size = any_dataset.num_sequences
    assert (
        {len(each) for each in batches} == {len(loader) for loader in ranks} == {-(-size // (world_size * batch_size))}
    )
    ordered = [sequence for step in zip(*batches, strict=True) for sequence in sequences(step)]
    assert ordered[:size] == epoch_of(any_dataset, 0)
    assert all(map(is_padding, ordered[size:]))


@pytest.mark.slow
@FEW
@given(first=SHAPES, second=SHAPES, before=st.integers(0, 60), after=st.integers(1, 45))
def test_a_stream_goes_on_where_it_stopped_on_any_number_of_ranks(
    any_dataset: PackedDataset, first: tuple[int, int], second: tuple[int, int], before: int, after: int
) -> None:
    stopped = ranks_of(any_dataset, *first)
    taken = sequences(take_passes(stopped, before))
    states = [loader.state_dict() for loader in stopped]
    assert states == [states[0]] * len(states)
    resumed = ranks_of(any_dataset, *second)
    for loader in resumed:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    taken += sequences(take_passes(resumed, after))
    taken = [sequence for sequence in taken if not is_padding(sequence)]
    size = any_dataset.num_sequences
    whole = [sequence for epoch in range(1 + len(taken) // size) for sequence in epoch_of(any_dataset, epoch)]
    assert taken == whole[: len(taken)]
    assert len(taken) >= after


@FEW
@given(shape=SHAPES, stop=st.integers(0, 30))
def test_every_document_is_trained_on_once_in_an_epoch_whatever_stops_it(
    make_dataset: Callable[..., PackedDataset], shape: tuple[int, int], stop: int
) -> None:
    for dataset in make_dataset("sequential"), make_dataset("best_fit"):
        stopped = ranks_of(dataset, 3, 1)
        steps = min(stop, len(stopped[0]) - 1)
        tokens = [token for each in sequences(take_passes(stopped, steps)) for token in each]
        resumed = ranks_of(dataset, *shape)
        for loader in resumed:
            loader.load_state_dict(stopped[0].state_dict())
        rest = take_passes(resumed, resumed[0]._batches_from(resumed[0].consumed))
        tokens += [token for each in sequences(rest) for token in each]
        assert sorted(filter(None, tokens)) == list(range(1, sum(LENGTHS) + 1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetched_batches_are_not_counted(dataset: PackedDataset, num_workers: int) -> None:
    loader = resumable(dataset, num_workers=num_workers)
    place = {"epoch": 0, "steps": 0, "accumulate": 1, "fingerprint": FINGERPRINT}
    assert loader.state_dict() == place | {"consumed": 0, "batches": 0}
    batches = iter(loader)
    for count in range(1, 21):
        next(batches)
        assert loader.state_dict() == place | {"consumed": count, "batches": count}
        assert len(loader) == 20
    loader.close()


def test_asking_for_an_iterator_twice_skips_nothing(dataset: PackedDataset) -> None:
    loader = resumable(dataset)
    taken = sequences(islice(loader, 5))
    loader.load_state_dict(loader.state_dict())
    for _ in range(3):
        iterator = iter(loader)
        assert (len(loader), loader.batches) == (20, 5)
    assert taken + sequences(iterator) == epoch_of(dataset, 0)


def test_a_pass_that_is_left_off_goes_on_in_the_next(dataset: PackedDataset) -> None:
    loader = resumable(dataset)
    taken = sequences(islice(loader, 15))
    iterator = iter(loader)
    assert len(loader) == 5
    assert taken + sequences(iterator) == epoch_of(dataset, 0)
    assert sequences(islice(loader, 20)) == epoch_of(dataset, 1)


def test_the_length_after_a_resume_counts_batches_before_and_left(dataset: PackedDataset) -> None:
    before = resumable(dataset, rank=1, world_size=2)
    list(islice(before, 6))
    alone, many = resumable(dataset), resumable(dataset, world_size=4)
    for loader, length in (alone, 6 + 8), (many, 6 + 2):
        loader.load_state_dict(before.state_dict())
        assert len(loader) == length
        assert len(list(loader)) == length - 6


@pytest.mark.slow
@FEW
@given(
    shape=SHAPES,
    accumulate=st.integers(1, 3),
    stop=st.integers(0, 30),
    steps=st.lists(st.integers(1, 12), min_size=1, max_size=3, unique=True),
)
def test_a_curriculum_cuts_documents_by_the_optimizer_step(
    any_dataset: PackedDataset, shape: tuple[int, int], accumulate: int, stop: int, steps: list[int]
) -> None:
    curriculum = {0: 2, **{step: 3 + index for index, step in enumerate(sorted(steps))}}
    options = {"curriculum": curriculum, "accumulate": accumulate}
    loaders = ranks_of(any_dataset, *shape, **options)
    per_pass = len(loaders[0])
    before = take_passes(loaders, stop)
    resumed = ranks_of(any_dataset, *shape, **options)
    for loader in resumed:
        loader.load_state_dict(loaders[0].state_dict())
    batches = (before + take_passes(resumed, 40 - stop))[:: shape[0]]
    done = 0
    for index, batch in enumerate(batches):
        assert batch.max_seqlen == curriculum[max(step for step in curriculum if step <= done)]
        assert batch.cu_seqlens.diff().max() <= batch.max_seqlen
        done += (index % per_pass + 1) % accumulate == 0 or index % per_pass == per_pass - 1
    assert sequences(batches) == sequences(take_passes(ranks_of(any_dataset, *shape), 40)[:: shape[0]])


def test_a_curriculum_goes_on_at_its_step_if_other_batches_make_one(dataset: PackedDataset) -> None:
    before = resumable(dataset, curriculum={0: 2, 5: 4}, accumulate=2)
    list(islice(before, 8))  # four steps
    after = resumable(dataset, curriculum={0: 2, 5: 4}, accumulate=1)
    after.load_state_dict(before.state_dict())
    assert [batch.max_seqlen for batch in islice(after, 3)] == [2, 4, 4]


def test_sets_are_evaluated_one_after_the_other(make_store: Callable[..., TokenStore], tmp_path: Path) -> None:
    splits = [PackedSplit(make_store(each), "train", 8, "sequential", tmp_path) for each in (LENGTHS, [6, 5])]
    dataset = PackedDataset(splits, InTurn([split.plan.num_sequences for split in splits]), BYTE_LENGTHS, padding=0)
    tokens = [token for sequence in sequences(PackedLoader(dataset, batch_size=3)) for token in sequence]
    assert tokens == [*range(1, 158), 0, 0, 0, *range(1, 12), *[0] * 21]


def test_a_dataset_travels_to_a_worker_without_its_tokens(dataset: PackedDataset) -> None:
    whole = [SequenceRange(1, 0, 20, 8)]
    expected = dataset[whole].tolist()
    dataset.byte_lengths = dataset.byte_lengths[:1].repeat(200)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 3500
    assert pickle.loads(pickled)[whole].tolist() == expected


class LongSequences(Dataset[Tensor]):
    """Batches of half a million tokens, 12 MB each, no two of a size."""

    offsets = np.array([0, 2**19])
    has_byte_counts = False

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Tensor:
        row: Any = Row(self, SequentialPlan(self.offsets, 2**19).pieces(0))  # type: ignore[arg-type]
        return pack_documents([row], 2**19 + index * 16, BYTE_LENGTHS, padding=0, max_seqlen=2**19)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.ones(lengths.sum(), dtype=np.int64)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="tells the memory of a process on Linux only")
def test_a_worker_does_not_grow_with_the_long_sequences_it_has_packed() -> None:
    batches: Any = iter(DataLoader(LongSequences(), batch_size=None, num_workers=1))
    sizes = []
    for _ in batches:
        lines = Path(f"/proc/{batches._workers[0].pid}/smaps_rollup").read_text().splitlines()
        sizes.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")))
    assert min(sizes[50:]) < 80_000  # kB: it holds 20 to 70 MB, by the batches on their way, and held 105 once it grew


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(lambda path: os.truncate(path, 20), "is truncated"), (Path.unlink, "cannot be read: No such file or directory")],
    ids=["truncated", "gone"],
)
def test_a_shard_that_is_damaged_meanwhile_is_named(
    dataset: PackedDataset, num_workers: int, damage: Callable[[Path], None], message: str
) -> None:
    path = Path(dataset.splits[0].store.path, "shards", "00001", "train.bin")
    damage(path)
    with pytest.raises(ValueError, match=f"^{path} {message}$"):
        list(PackedLoader(dataset, batch_size=1, num_workers=num_workers))


def test_other_data_cannot_be_resumed_and_the_setting_is_named(dataset: PackedDataset) -> None:
    state = resumable(dataset).state_dict()
    for name, old, new in ("data.seq_len", 8, 16), ("data.seed", 3, 4), ("data.mixture.code.weight", "unset", 1.0):
        loader = ResumableLoader(dataset, fingerprint=FINGERPRINT | {name: new}, batch_size=1)
        with pytest.raises(ValueError, match=f"{name} must stay as it was to resume: .* with {old}, now it is {new}"):
            loader.load_state_dict(state)
        other = resumable(dataset)
        with pytest.raises(ValueError, match=f"{name} must stay as it was to resume: .* with {new}, now it is {old}"):
            other.load_state_dict(loader.state_dict())
