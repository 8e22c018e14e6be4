"""Who chose which block, against plain Python sets, under Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_kernels.packing import batch_layout
from support.packings import PACKINGS, SMALL, cu_seqlens

block_lists = pytest.importorskip("nsa_kernels.triton.block_lists", exc_type=ImportError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


def random_choices(lengths, config, num_kv_heads, generator):
    """Up to n blocks of each query's past and present in any order, -1 anywhere, int32 [T, H_kv, n]."""
    n, rows = config.num_selected_blocks, []
    for length in lengths:
        for t in range(length):
            for _ in range(num_kv_heads):
                chosen = torch.randperm(t // config.select_block_size + 1, generator=generator)[:n]
                row = torch.cat([chosen, torch.full((n - len(chosen),), -1)])
                row[torch.rand(n, generator=generator) < 0.2] = -1
                rows.append(row[torch.randperm(n, generator=generator)])
    return torch.stack(rows).view(-1, num_kv_heads, n).int()


def pairs_of(block_indices, first_row):
    """Every (KV head, block row, token) that a slot holds."""
    return sorted(
        (g, int(first_row[t]) + j, t)
        for t, heads in enumerate(block_indices.tolist())
        for g, slots in enumerate(heads)
        for j in slots
        if j >= 0
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "queries"),
    [
        ("mixed", 16),
        ("mixed", 32),
        ("twice_the_reach", 3),
        ("twice_the_reach", 32),
        ("empty_document_in_the_middle", 1),
        ("one_token", 1),
        ("one_token", 32),
    ],
)
def test_a_union_holds_each_block_of_its_tile_once_and_who_chose_it(name, queries):
    lengths, H_kv = PACKINGS[name], 2
    layout = batch_layout(cu_seqlens(lengths), sum(lengths), SMALL)
    chosen = random_choices(lengths, SMALL, H_kv, torch.Generator().manual_seed(0))
    unions = block_lists.unite(chosen, layout.document_start, SMALL.select_block_size, queries)
    assert len(unions.size) == -(-sum(lengths) // queries)
    expected = [[{} for _ in range(H_kv)] for _ in unions.size]
    for t, heads in enumerate(chosen.tolist()):
        for g, slots in enumerate(heads):
            for j in slots:
                if j >= 0:
                    start = int(layout.document_start[t]) + j * SMALL.select_block_size
                    masks = expected[t // queries][g]
                    masks[start] = masks.get(start, 0) | 1 << t % queries
    for tile, heads in enumerate(expected):
        for g, masks in enumerate(heads):
            used = int(unions.size[tile, g])
            assert unions.start[tile, g, :used].tolist() == sorted(masks)
            bits = [mask % 2**32 for mask in unions.mask[tile, g, :used].tolist()]
            assert bits == [masks[start] for start in sorted(masks)]
    assert int(unions.size.max()) > 1 or name == "one_token"


@pytest.mark.parametrize("item_length", [1, 7, 10_000])
@pytest.mark.parametrize("name", PACKINGS)
def test_an_inverse_list_holds_each_query_of_each_block_once_in_order(name, item_length):
    assert_inverse(PACKINGS[name], item_length, seed=0)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None, database=None)
def test_an_inverse_list_of_any_documents_is_complete(lengths, item_length, seed):
    assert_inverse(lengths, item_length, seed)


def assert_inverse(lengths, item_length, seed, num_kv_heads=2):
    layout = batch_layout(cu_seqlens(lengths), sum(lengths), SMALL)
    B = len(layout.block_start)
    chosen = random_choices(lengths, SMALL, num_kv_heads, torch.Generator().manual_seed(seed))
    lists = block_lists.inverse_list(chosen, layout.first_block, B, item_length)
    assert {part.dtype for part in lists[:-1]} == {torch.int32}
    found, parts = [], {}
    items = zip(*(x.tolist() for x in lists[1:5]), strict=True)
    for row, begin, end, part in items:
        if row < 0:
            continue
        assert 0 <= end - begin <= item_length
        found += [(row // B, row % B, t) for t in lists.token[begin:end].tolist()]
        parts.setdefault(row, []).append(part)
    assert found == pairs_of(chosen, layout.first_block)  # in order: ascending tokens within a block
    assert set(parts) == set(range(num_kv_heads * B))  # a block that nobody chose has an item too, to write zeros
    numbered = []
    for row, its_parts in parts.items():
        assert lists.row_items[row] == len(its_parts)
        if len(its_parts) == 1:
            assert its_parts == [-1]
        else:
            first = int(lists.row_part[row])
            assert its_parts == list(range(first, first + len(its_parts)))
            numbered += its_parts
    assert numbered == list(range(len(numbered)))
    assert len(numbered) <= lists.num_parts
