"""The layouts of a packed batch against plain Python loops."""

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import (
    batch_layout,
    compressed_block_centres,
    compressed_layout,
    document_index,
    document_positions,
    selection_layout,
    sliding_runs,
)
from support.packings import PACKINGS, SMALL, cu_seqlens
from torch._subclasses.fake_tensor import FakeTensorMode


@st.composite
def geometries(draw):
    stride = draw(st.integers(1, 4))
    return NSAConfig(
        compress_block_size=stride * draw(st.integers(1, 4)),
        compress_stride=stride,
        select_block_size=stride * draw(st.integers(1, 5)),
    )


lengths_of_documents = st.lists(st.integers(0, 30), min_size=1, max_size=7)
ragged = settings(max_examples=150, deadline=None, database=None)


def rows(layout):
    """The layout's real rows as (document, block)."""
    return list(zip(layout.document[layout.is_block].tolist(), layout.block[layout.is_block].tolist(), strict=True))


def assert_unused_rows_come_last_and_hold_zeros(layout):
    used = int(layout.is_block.sum())
    assert layout.is_block[:used].all()
    assert not layout.document[used:].any()
    assert not layout.block[used:].any()


@given(lengths_of_documents)
@example([0, 0, 3, 0])
@example([0])
@ragged
def test_every_token_knows_its_document_and_position(lengths):
    offsets, T = cu_seqlens(lengths), sum(lengths)
    assert document_index(offsets, T).tolist() == [n for n, length in enumerate(lengths) for _ in range(length)]
    assert document_positions(offsets, T).tolist() == [t for length in lengths for t in range(length)]


@given(lengths_of_documents, geometries())
@example([0, 3, 0, 5, 0], SMALL)
@example([], SMALL)
@ragged
def test_compressed_rows_are_the_complete_blocks_in_order(lengths, config):
    l, d, T = config.compress_block_size, config.compress_stride, sum(lengths)  # noqa: E741
    expected = [(n, i) for n, length in enumerate(lengths) for i in range(length) if i * d + l <= length]
    layout = compressed_layout(cu_seqlens(lengths), T, config)
    assert rows(layout) == expected
    assert layout.cu_blocks.tolist() == [sum(n < document for n, _ in expected) for document in range(len(lengths) + 1)]
    assert len(layout.block) == len(layout.document) == len(layout.is_block) == max(T // d, 1)
    assert_unused_rows_come_last_and_hold_zeros(layout)
    centres = compressed_block_centres(cu_seqlens(lengths), T, config)
    assert centres.tolist() == [i * d + l // 2 for _, i in expected] + [l // 2] * (len(centres) - len(expected))


@given(lengths_of_documents, geometries())
@example([0, 3, 0, 5, 0], SMALL)
@example([], SMALL)
@ragged
def test_selection_rows_are_all_blocks_the_last_shorter_one_included(lengths, config):
    size, T = config.select_block_size, sum(lengths)
    expected = [(n, j) for n, length in enumerate(lengths) for j in range(length) if j * size < length]
    layout = selection_layout(cu_seqlens(lengths), T, config)
    assert rows(layout) == expected
    assert layout.cu_blocks.tolist() == [sum(n < document for n, _ in expected) for document in range(len(lengths) + 1)]
    assert len(layout.block) == len(layout.document) == len(layout.is_block) == T // size + len(lengths)
    assert_unused_rows_come_last_and_hold_zeros(layout)


def test_a_document_shorter_than_a_block_has_no_compressed_row():
    layout = compressed_layout(cu_seqlens([3, 1, 4, 3]), 11, SMALL)
    assert rows(layout) == [(2, 0)]
    assert layout.cu_blocks.tolist() == [0, 0, 0, 1, 1]


def assert_both_sides_tell_the_same(runs, sees):
    """`runs` against pairs (query, key): a run of keys for each query, a run of queries for each key."""
    T, S = len(runs.first), len(runs.seen_from)
    from_queries = [(t, s) for t in range(T) for s in range(int(runs.first[t]), int(runs.end[t]))]
    from_keys = [(t, s) for s in range(S) for t in range(int(runs.seen_from[s]), int(runs.seen_to[s]))]
    assert from_queries == sorted(sees)
    assert sorted(from_keys) == from_queries
    assert {part.dtype for part in runs} == {torch.int32}


@pytest.mark.parametrize("window_size", [1, 6, 300])
@pytest.mark.parametrize("name", PACKINGS)
def test_sliding_runs_are_the_window_of_each_token_in_its_document(name, window_size):
    offsets, T = cu_seqlens(PACKINGS[name]), sum(PACKINGS[name])
    document = document_index(offsets, T)
    runs = sliding_runs(offsets[document], offsets[document + 1], window_size)
    sees = [(t, s) for t in range(T) for s in range(max(t - window_size + 1, 0), t + 1) if document[s] == document[t]]
    assert_both_sides_tell_the_same(runs, sees)
    assert len(sees) >= T


@given(lengths_of_documents, geometries(), st.integers(1, 12))
@example(PACKINGS["mixed"], SMALL, 6)
@example(PACKINGS["empty_documents_at_both_ends"], SMALL, 1)
@example(PACKINGS["all_shorter_than_a_compress_block"], SMALL, 6)
@example(PACKINGS["one_token"], SMALL, 6)
@settings(max_examples=60, deadline=None, database=None)
def test_the_layout_of_a_batch_says_where_each_token_and_block_lies(lengths, config, window_size):
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size  # noqa: E741
    config, T = replace(config, window_size=window_size), sum(lengths)
    layout = batch_layout(cu_seqlens(lengths), T, config)
    assert {part.dtype for part in layout} == {torch.int32}
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    tokens = [(n, t) for n, length in enumerate(lengths) for t in range(length)]
    summaries = [(n, i) for n, length in enumerate(lengths) for i in range(length) if i * d + l <= length]
    blocks = [(n, j) for n, length in enumerate(lengths) for j in range(length) if j * size < length]
    assert layout.document_start.tolist() == [starts[n] for n, _ in tokens]
    assert layout.document_end.tolist() == [starts[n] + lengths[n] for n, _ in tokens]
    assert layout.first_summary.tolist() == [sum(m < n for m, _ in summaries) for n, _ in tokens]
    assert layout.first_block.tolist() == [sum(m < n for m, _ in blocks) for n, _ in tokens]

    def padded(values, length):
        return values + [T] * (length - len(values))

    C, B = max(T // d, 1), T // size + len(lengths)
    assert layout.summary_start.tolist() == padded([starts[n] + i * d for n, i in summaries], C)
    assert layout.block_start.tolist() == padded([starts[n] + j * size for n, j in blocks], B)
    ends = [min(starts[n] + (j + 1) * size, starts[n] + lengths[n]) for n, j in blocks]
    assert layout.block_end.tolist() == padded(ends, B)
    sees = [
        (starts[n] + t, row) for n, t in tokens for row, (m, i) in enumerate(summaries) if m == n and i * d + l - 1 <= t
    ]
    assert_both_sides_tell_the_same(layout.compressed_runs, sees)
    assert layout.summary_from[len(summaries) :].tolist() == [T] * (C - len(summaries))
    in_window = [(starts[n] + t, starts[n] + s) for n, t in tokens for s in range(max(t - window_size + 1, 0), t + 1)]
    assert_both_sides_tell_the_same(layout.sliding_runs, in_window)


def test_batch_mixing_all_lengths_covers_what_it_should():
    """The packing other tests rely on has an empty document within, short ones, long ones and an odd total."""
    lengths = PACKINGS["mixed"]
    assert 0 in lengths[1:-1]
    assert {1, 3, 4, 5, 7, 8, 9, 6, 31, 32, 33} <= set(lengths)
    assert max(lengths) > 2 * SMALL.selected_tokens
    assert all(sum(lengths) % size for size in (2, 3, 4, 6, 8))


@pytest.mark.parametrize("layout", [compressed_layout, selection_layout, compressed_block_centres, batch_layout])
def test_layouts_read_no_value_back_to_the_host(layout):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        offsets = mode.from_tensor(torch.empty(4, dtype=torch.int32))
        parts = layout(offsets, 100, SMALL)
        with pytest.raises(Exception, match=r"item|data-dependent|_local_scalar_dense"):
            int(offsets.sum())  # what the mode would say of a read
    assert parts is not None


@pytest.mark.parametrize("window_size", [2**31 - 1, 2**31, sys.maxsize])
def test_a_window_of_any_size_ends_with_its_document(window_size):
    start, end = torch.tensor([0, 0, 0, 3, 3]).int(), torch.tensor([3, 3, 3, 5, 5]).int()
    runs = sliding_runs(start, end, window_size)
    assert all(x.dtype == torch.int32 for x in runs)
    assert runs.first.tolist() == start.tolist()
    assert runs.seen_to.tolist() == end.tolist()


def test_only_sizes_that_no_document_reaches_are_replaced():
    config = NSAConfig(compress_block_size=2**40, compress_stride=16, select_block_size=2**50)
    fitting = config.within(10_000)
    assert fitting.compress_stride == 16
    assert fitting.compress_block_size == 10_016
    assert fitting.select_block_size == 2**14
    assert config.within(2**51) == config
    assert NSAConfig().within(1) == NSAConfig()
    assert NSAConfig(select_block_size=4096, window_size=sys.maxsize).within(1).select_block_size == 4096
    assert config.within(1).select_block_size == 64
