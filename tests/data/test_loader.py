import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.data.loader import PackedLoader, ResumableLoader
from nsa_lightning.data.packing import PackedDataset
from nsa_lightning.data.token_store import TokenStore

BYTE_LENGTHS = np.ones(4096, dtype=np.int64)
FINGERPRINT: dict[str, str | int | float] = {"data.seq_len": 8, "data.seed": 3}
SIZES = st.integers(1, 4)
SHAPES = st.tuples(SIZES, SIZES)  # ranks, sequences in a batch


@pytest.fixture
def dataset(make_store: Callable[..., TokenStore]) -> PackedDataset:
    store = make_store([7, 30, 3, 1, 12, 55, 9, 20, 4, 16])  # 157 tokens: 20 sequences, the last one short
    return PackedDataset(store, "train", seq_len=8, seed=3, byte_lengths=BYTE_LENGTHS, padding=0)


def resumable(dataset: PackedDataset, **options: Any) -> ResumableLoader:
    return ResumableLoader(dataset, fingerprint=FINGERPRINT, **{"batch_size": 1, **options})


def sequences(batches: Iterable[PackedBatch]) -> list[tuple[int, ...]]:
    """Each sequence of some batches, by its tokens."""
    return [tuple(row) for batch in batches for row in batch.tokens.view(-1, 8).tolist()]


def is_padding(sequence: tuple[int, ...]) -> bool:
    return set(sequence) == {0}


def epoch_of(dataset: PackedDataset, epoch: int) -> list[tuple[int, ...]]:
    loader = PackedLoader(dataset, batch_size=1)
    return sequences(loader._stream(epoch, 0))


def take_passes(loaders: list[ResumableLoader], count: int) -> list[tuple[int, ...]]:
    """`count` batches of every rank, pass after pass as a trainer takes them, in the order of the global stream."""
    taken: list[tuple[int, ...]] = []
    while count > 0:
        steps = list(islice(zip(*loaders, strict=True), count))
        assert steps, "a pass without a batch"
        taken += [sequence for ranks in steps for sequence in sequences(ranks)]
        count -= len(steps)
    return taken


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_workers_change_nothing(dataset: PackedDataset, num_workers: int) -> None:
    loader = resumable(dataset, num_workers=num_workers, batch_size=3)
    passes = [sequences(loader) for _ in range(3)]
    loader.close()
    expected = [[*epoch_of(dataset, epoch), (0,) * 8] for epoch in range(3)]
    assert passes == expected
    assert len({tuple(sorted(each)) for each in passes}) == len({tuple(each) for each in passes}) == 3


def test_a_plain_loader_repeats_one_order(dataset: PackedDataset) -> None:
    loader = PackedLoader(dataset, batch_size=2, num_workers=1)
    next(iter(loader))  # a pass that is left off does not move the next one
    assert sequences(loader) == sequences(loader) == epoch_of(dataset, 0)
    assert len(loader) == 10
    loader.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world_size=SIZES, batch_size=SIZES)
def test_ranks_share_an_epoch_and_have_as_many_batches(
    dataset: PackedDataset, world_size: int, batch_size: int
) -> None:
    options = {"world_size": world_size, "batch_size": batch_size}
    ranks = [PackedLoader(dataset, rank=rank, **options) for rank in range(world_size)]
    batches = [list(loader) for loader in ranks]
    assert {len(each) for each in batches} == {len(loader) for loader in ranks} == {-(-20 // (world_size * batch_size))}
    ordered = [sequence for step in zip(*batches, strict=True) for sequence in sequences(step)]
    assert ordered[:20] == epoch_of(dataset, 0)
    assert all(map(is_padding, ordered[20:]))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=SHAPES, second=SHAPES, before=st.integers(0, 60), after=st.integers(1, 45))
def test_a_stream_goes_on_where_it_stopped_on_any_number_of_ranks(
    dataset: PackedDataset, first: tuple[int, int], second: tuple[int, int], before: int, after: int
) -> None:
    def ranks(world_size: int, batch_size: int) -> list[ResumableLoader]:
        options = {"world_size": world_size, "batch_size": batch_size}
        return [resumable(dataset, rank=rank, **options) for rank in range(world_size)]

    stopped = ranks(*first)
    taken = take_passes(stopped, before)
    states = [loader.state_dict() for loader in stopped]
    assert states == [states[0]] * len(states)
    resumed = ranks(*second)
    for loader in resumed:
        loader.load_state_dict(json.loads(json.dumps(states[0])))
    taken = [sequence for sequence in taken + take_passes(resumed, after) if not is_padding(sequence)]
    whole = [sequence for epoch in range(1 + len(taken) // 20) for sequence in epoch_of(dataset, epoch)]
    assert taken == whole[: len(taken)]
    assert len(taken) >= after


@pytest.mark.parametrize("num_workers", [0, 2])
def test_prefetched_batches_are_not_counted(dataset: PackedDataset, num_workers: int) -> None:
    loader = resumable(dataset, num_workers=num_workers)
    assert loader.state_dict() == {"epoch": 0, "consumed": 0, "batches": 0, "fingerprint": FINGERPRINT}
    batches = iter(loader)
    for count in range(1, 21):
        next(batches)
        assert loader.state_dict() == {"epoch": 0, "consumed": count, "batches": count, "fingerprint": FINGERPRINT}
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


def test_other_data_cannot_be_resumed_and_the_setting_is_named(dataset: PackedDataset) -> None:
    state = resumable(dataset).state_dict()
    for name, old, new in ("data.seq_len", 8, 16), ("data.seed", 3, 4):
        loader = ResumableLoader(dataset, fingerprint=FINGERPRINT | {name: new}, batch_size=1)
        with pytest.raises(ValueError, match=f"{name} must stay as it was to resume: .* with {old}, now it is {new}"):
            loader.load_state_dict(state)
