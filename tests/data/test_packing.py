from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch, view_flat
from nsa_lightning.data.packing import PackPlan, Row, SequentialPlan, pack_documents

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=30)
SEQ_LEN = st.integers(2, 40)
FEW_LENGTHS, SHORT_SEQ_LEN = st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(2, 20)
PADDING = 0
BYTE_LENGTHS = np.arange(4096) * 7 % 11


class Numbered(NamedTuple):
    """A split whose tokens are numbered from 1 through all its documents."""

    offsets: np.ndarray
    has_byte_counts: bool = False

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        pieces = zip(starts.tolist(), lengths.tolist(), strict=True)
        return np.concatenate([np.arange(start + 1, start + length + 1) for start, length in pieces])

    def read_byte_counts(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return 3 * self.read(starts, lengths)

    def document_of(self, token: int) -> int:
        return int(np.searchsorted(self.offsets, token - 1, side="right")) - 1


def numbered(lengths: list[int]) -> Numbered:
    return Numbered(np.cumsum([0, *lengths]))


def rows_of(split: Numbered, plan: PackPlan, sequences: range) -> list[Row | None]:
    return [Row(split, plan.pieces(i)) if i < plan.num_sequences else None for i in sequences]  # type: ignore[arg-type]


def pack(lengths: list[int], seq_len: int, sequences: range, max_seqlen: int | None = None) -> PackedBatch:
    split = numbered(lengths)
    rows = rows_of(split, SequentialPlan(split.offsets, seq_len), sequences)
    flat = pack_documents(rows, seq_len, BYTE_LENGTHS, padding=PADDING, max_seqlen=max_seqlen or seq_len)
    return view_flat(flat)


def pieces_of(batch: PackedBatch) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise(batch.cu_seqlens.tolist())]


@given(LENGTHS, SEQ_LEN)
def test_a_sequential_plan_is_every_document_once_in_order(lengths: list[int], seq_len: int) -> None:
    plan = SequentialPlan(numbered(lengths).offsets, seq_len)
    sequences = [list(zip(*plan.pieces(i), strict=True)) for i in range(plan.num_sequences)]
    sizes = [sum(stop - start for _, start, stop in pieces) for pieces in sequences]
    assert sizes[:-1] == [seq_len] * (len(sizes) - 1)
    assert 0 < sizes[-1] <= seq_len
    place = dict.fromkeys(range(len(lengths)), 0)
    for document, start, stop in [piece for pieces in sequences for piece in pieces]:
        assert place[document] == start < stop
        place[document] = stop
    assert list(place.values()) == lengths
    seen = [document for pieces in sequences for document, _, _ in pieces]
    assert plan.cut_documents() == sum(seen.count(document) > 1 for document in range(len(lengths)))


@given(FEW_LENGTHS, SHORT_SEQ_LEN, st.integers(1, 5), st.integers(1, 20))
def test_every_token_comes_once_and_in_its_own_document(
    lengths: list[int], seq_len: int, batch_size: int, max_seqlen: int
) -> None:
    split = numbered(lengths)
    num_sequences = SequentialPlan(split.offsets, seq_len).num_sequences
    max_seqlen = min(max_seqlen, seq_len)
    seen: list[int] = []
    targets: list[int] = []
    num_pieces = 0
    for first in range(0, num_sequences, batch_size):
        batch = pack(lengths, seq_len, range(first, first + batch_size), max_seqlen)
        for piece in pieces_of(batch):
            tokens = batch.tokens[piece].tolist()
            if tokens[0] == PADDING:
                assert set(tokens) == {PADDING}
                assert set(batch.targets[piece].tolist()) == {IGNORE_INDEX}
                continue
            assert tokens == list(range(tokens[0], tokens[-1] + 1))
            assert split.document_of(tokens[0]) == split.document_of(tokens[-1])
            assert batch.targets[piece].tolist() == [*tokens[1:], IGNORE_INDEX]
            seen += tokens
            targets += tokens[1:]
            num_pieces += 1
    assert sorted(seen) == list(range(1, split.offsets[-1] + 1))
    assert len(set(targets)) == len(targets) == len(seen) - num_pieces


@given(LENGTHS, SEQ_LEN, st.integers(0, 40), st.integers(1, 4), st.integers(1, 40))
def test_a_batch_has_whole_sequences_that_end_in_cu_seqlens(
    lengths: list[int], seq_len: int, first: int, batch_size: int, max_seqlen: int
) -> None:
    max_seqlen = min(max_seqlen, seq_len)
    batch = pack(lengths, seq_len, range(first, first + batch_size), max_seqlen)
    assert len(batch.tokens) == len(batch.targets) == len(batch.positions) == seq_len * batch_size
    assert set(range(0, seq_len * batch_size + 1, seq_len)) <= set(batch.cu_seqlens.tolist())
    assert batch.max_seqlen == max_seqlen >= batch.cu_seqlens.diff().max()
    assert batch.cu_seqlens.diff().min() > 0
    for piece in pieces_of(batch):
        assert batch.positions[piece].tolist() == list(range(piece.stop - piece.start))
    dtypes = [str(field.dtype).removeprefix("torch.") for field in (*batch[:4], batch.target_bytes)]
    assert dtypes == ["int64", "int64", "int64", "int32", "int64"]
    assert type(batch.max_seqlen) is int
    assert batch.target_bytes.shape == (len(batch.cu_seqlens) - 1,)


@given(LENGTHS, SEQ_LEN, st.integers(0, 40))
def test_target_bytes_are_those_of_the_scored_targets(lengths: list[int], seq_len: int, first: int) -> None:
    batch = pack(lengths, seq_len, range(first, first + 3))
    for piece, size in zip(pieces_of(batch), batch.target_bytes.tolist(), strict=True):
        targets = batch.targets[piece].numpy()
        assert size == BYTE_LENGTHS[targets[targets != IGNORE_INDEX]].sum()


def test_the_byte_counts_of_a_set_come_before_those_of_the_tokens() -> None:
    split = numbered([5, 2, 4])._replace(has_byte_counts=True)
    rows = [Row(split, SequentialPlan(split.offsets, 8).pieces(i)) for i in range(2)]  # type: ignore[arg-type]
    batch = view_flat(pack_documents(rows, 8, BYTE_LENGTHS, padding=PADDING, max_seqlen=3))
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 7, 8, 11, 14, 16]
    assert batch.target_bytes.tolist() == [3 * (2 + 3), 3 * 5, 3 * 7, 0, 3 * (10 + 11), 0, 0]


def test_a_document_that_is_cut_goes_on_as_one_of_its_own() -> None:
    batch = pack([5, 2, 4], 4, range(3))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, PADDING]
    assert batch.cu_seqlens.tolist() == [0, 4, 5, 7, 8, 11, 12]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 0, 1, 2, 0]
    x = IGNORE_INDEX
    assert batch.targets.tolist() == [2, 3, 4, x, x, 7, x, x, 10, 11, x, x]


def test_a_shorter_longest_piece_cuts_every_document_from_its_own_start() -> None:
    batch = pack([5, 2, 4], 8, range(2), max_seqlen=2)
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 5, 7, 8, 10, 11, 13, 15, 16]
    x = IGNORE_INDEX
    assert batch.targets.tolist() == [2, x, 4, x, x, 7, x, x, 10, x, x, *[x] * 5]


def test_a_sequence_past_the_plan_is_not_scored_at_all() -> None:
    batch = pack([5], 4, range(7, 9))
    assert batch.tokens.tolist() == [PADDING] * 8
    assert batch.targets.tolist() == [IGNORE_INDEX] * 8
    assert batch.cu_seqlens.tolist() == [0, 4, 8]
    assert batch.target_bytes.tolist() == [0, 0]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="tells what is mapped on Linux only")
def test_what_was_read_of_a_map_is_given_back(tmp_path: Path) -> None:
    def mapped() -> int:
        region = Path("/proc/self/smaps").read_text().split(str(path))[1]
        return int(region.split("Rss:")[1].split()[0])

    path = tmp_path / "offsets.npy"
    np.save(path, np.arange(2**18))
    plan = SequentialPlan(np.asarray(np.load(path, mmap_mode="r")), 4)
    assert plan.cut_documents() == 0
    assert mapped() >= 2048
    plan.release()
    assert mapped() == 0
    assert plan.pieces(2**16 - 2).documents[0] == 2**18 - 8


def test_a_plan_does_not_read_all_offsets_to_find_a_sequence() -> None:
    class Counting(np.ndarray):
        read = 0

        def __getitem__(self, key: object) -> object:
            value = super().__getitem__(key)
            Counting.read += np.size(value)
            return value

    plan = SequentialPlan(np.arange(10**6).view(Counting), 4)
    assert plan.pieces(200_000).documents.tolist() == list(range(800_000, 800_004))
    assert 0 < Counting.read < 100
