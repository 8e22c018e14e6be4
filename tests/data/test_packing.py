import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.packing import PackedDataset, PackPlan, SequenceRange, pack_documents
from nsa_lightning.data.token_store import TokenStore

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)
SEQ_LEN = st.integers(2, 40)
ORDER = st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3))
PADDING = 0
BYTE_LENGTHS = np.arange(4096) * 7 % 11


class Numbered(NamedTuple):
    """Documents whose tokens are numbered from 1 through all of them."""

    offsets: np.ndarray
    tokens: np.ndarray

    def document_of(self, token: int) -> int:
        return int(np.searchsorted(self.offsets, token - 1, side="right")) - 1


def numbered(lengths: list[int]) -> Numbered:
    offsets = np.cumsum([0, *lengths])
    return Numbered(offsets, np.arange(1, offsets[-1] + 1, dtype=np.uint16))


def plan_of(store: Numbered, seq_len: int, order: tuple[int, int] | None = None) -> PackPlan:
    return PackPlan(store.offsets, np.arange(len(store.offsets) - 1), seq_len, order)


def pack(store: Numbered, plan: PackPlan, sequences: range) -> PackedBatch:
    return pack_documents(store, plan, sequences, BYTE_LENGTHS, PADDING)  # type: ignore[arg-type]


def pieces_of(batch: PackedBatch) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(batch.cu_seqlens.tolist())]


@given(LENGTHS, SEQ_LEN, ORDER)
def test_the_pieces_of_a_plan_are_every_document_once_in_order(
    lengths: list[int], seq_len: int, order: tuple[int, int] | None
) -> None:
    plan = plan_of(numbered(lengths), seq_len, order)
    sequences = [list(zip(*plan.pieces(i), strict=True)) for i in range(plan.num_sequences)]
    sizes = [sum(stop - start for _, start, stop in pieces) for pieces in sequences]
    assert sizes[:-1] == [seq_len] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= seq_len
    place = dict.fromkeys(range(len(lengths)), 0)
    for document, start, stop in [piece for pieces in sequences for piece in pieces]:
        assert place[document] == start < stop
        place[document] = stop
    assert list(place.values()) == lengths


@given(LENGTHS, SEQ_LEN, ORDER, st.integers(1, 4), st.integers(1, 4))
def test_every_token_comes_once_and_in_its_own_document_for_any_ranks_and_batches(
    lengths: list[int], seq_len: int, order: tuple[int, int] | None, world_size: int, batch_size: int
) -> None:
    store = numbered(lengths)
    plan = plan_of(store, seq_len, order)
    starts = range(0, plan.num_sequences, world_size * batch_size)
    firsts = [start + rank * batch_size for start in starts for rank in range(world_size)]
    seen: list[int] = []
    targets: list[int] = []
    num_pieces = 0
    for batch in [pack(store, plan, range(first, first + batch_size)) for first in firsts]:
        for piece in pieces_of(batch):
            tokens = batch.tokens[piece].tolist()
            if tokens[0] == PADDING:
                assert set(tokens) == {PADDING}
                assert set(batch.targets[piece].tolist()) == {IGNORE_INDEX}
                continue
            assert tokens == list(range(tokens[0], tokens[-1] + 1))
            assert store.document_of(tokens[0]) == store.document_of(tokens[-1])
            assert batch.targets[piece].tolist() == [*tokens[1:], IGNORE_INDEX]
            seen += tokens
            targets += tokens[1:]
            num_pieces += 1
    assert sorted(seen) == store.tokens.tolist()
    assert len(set(targets)) == len(targets) == len(seen) - num_pieces


@given(LENGTHS, SEQ_LEN, st.integers(0, 40), st.integers(1, 4))
def test_a_batch_has_whole_sequences_that_end_in_cu_seqlens(
    lengths: list[int], seq_len: int, first: int, batch_size: int
) -> None:
    store = numbered(lengths)
    batch = pack(store, plan_of(store, seq_len), range(first, first + batch_size))
    assert len(batch.tokens) == len(batch.targets) == len(batch.positions) == seq_len * batch_size
    assert set(range(0, seq_len * batch_size + 1, seq_len)) <= set(batch.cu_seqlens.tolist())
    assert batch.max_seqlen == seq_len >= batch.cu_seqlens.diff().max()
    assert batch.cu_seqlens.diff().min() > 0
    for piece in pieces_of(batch):
        assert batch.positions[piece].tolist() == list(range(piece.stop - piece.start))
    dtypes = [str(field.dtype).removeprefix("torch.") for field in (*batch[:4], batch.target_bytes)]
    assert dtypes == ["int64", "int64", "int64", "int32", "int64"]


@given(LENGTHS, SEQ_LEN, st.integers(0, 40))
def test_target_bytes_are_those_of_the_scored_targets(lengths: list[int], seq_len: int, first: int) -> None:
    store = numbered(lengths)
    batch = pack(store, plan_of(store, seq_len), range(first, first + 3))
    scored = batch.targets[batch.targets != IGNORE_INDEX].numpy()
    assert batch.target_bytes.item() == BYTE_LENGTHS[scored].sum()


def test_a_document_that_is_cut_goes_on_as_one_of_its_own() -> None:
    store = numbered([5, 2, 4])
    batch = pack(store, plan_of(store, 4), range(3))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, PADDING]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7, 8, 11, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 0, 1, 2, 0]
    x = IGNORE_INDEX
    assert batch.targets.tolist() == [2, 3, 4, x, x, 7, x, x, 10, 11, x, x]


def test_a_sequence_past_the_plan_is_not_scored_at_all() -> None:
    store = numbered([5])
    batch = pack(store, plan_of(store, 4), range(7, 9))
    assert batch.tokens.tolist() == [PADDING] * 8
    assert batch.targets.tolist() == [IGNORE_INDEX] * 8
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.target_bytes.item() == 0


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    store = numbered([3] * 50)

    def documents(order: tuple[int, int] | None) -> list[int]:
        return plan_of(store, 150, order).pieces(0).documents.tolist()

    assert documents(None) == list(range(50))
    assert documents((3, 1)) == documents((3, 1))
    orders = [documents(order) for order in [None, (0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len({tuple(order) for order in orders}) == 5
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_no_release_of_numpy_changes_the_order() -> None:
    assert plan_of(numbered([1] * 10), 10, (7, 2)).pieces(0).documents.tolist() == [6, 7, 8, 4, 0, 1, 5, 3, 9, 2]


@pytest.fixture
def dataset(make_store: Callable[..., TokenStore]) -> PackedDataset:
    store = make_store([5, 9, 2, 14, 7])
    return PackedDataset(store, "train", seq_len=4, seed=0, byte_lengths=BYTE_LENGTHS, padding=PADDING)


def test_a_dataset_plans_each_epoch_it_is_asked_for(dataset: PackedDataset) -> None:
    assert dataset.num_sequences == dataset.plan(0).num_sequences == dataset.plan(1).num_sequences == 10
    epochs = [dataset[SequenceRange(epoch, 0, 10)].tokens.tolist() for epoch in (0, 1, 0)]
    assert epochs[0] == epochs[2] != epochs[1]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [0, 0, 0, *range(1, 38)]


def test_a_dataset_travels_to_a_worker_without_its_tokens(dataset: PackedDataset) -> None:
    whole = SequenceRange(1, 0, 10)
    expected = dataset[whole].tokens.tolist()
    dataset.byte_lengths = dataset.byte_lengths[:1].repeat(50)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1500
    assert pickle.loads(pickled)[whole].tokens.tolist() == expected
