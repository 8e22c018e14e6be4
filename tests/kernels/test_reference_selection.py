"""The reference's importance and choice of blocks against hand-computed numbers."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from nsa_kernels import reference
from nsa_kernels.geometry import NSAConfig
from support.packings import PACKINGS, SMALL, assert_same_blocks, chosen_sets, cu_seqlens, random_inputs
from support.reference import attend, compressed

RANKINGS = [
    SMALL,
    replace(SMALL, num_init_blocks=0),
    replace(SMALL, num_init_blocks=0, num_local_blocks=1, num_selected_blocks=1),
    replace(SMALL, num_selected_blocks=3),
    replace(SMALL, num_init_blocks=2, num_local_blocks=3, num_selected_blocks=7),
    replace(SMALL, num_selected_blocks=64),
    replace(SMALL, compress_stride=1, select_block_size=4, num_selected_blocks=5),
    replace(SMALL, compress_block_size=12, compress_stride=3, select_block_size=6, num_selected_blocks=6),
]


def coefficients(config: NSAConfig, lengths: list[int], token: int) -> list[list[int]]:
    """How often each p_cmp[i] counts in each p_slc[j] for one query, [J][C].

    One KV head a compressed row; the keys are so that row i alone has p = 1 in head i, and p = 0 elsewhere.
    """
    num_rows = sum(lengths) // config.compress_stride
    q = torch.ones(sum(lengths), num_rows, 1, dtype=torch.float64)
    keys = torch.full((num_rows, num_rows), -1e4, dtype=torch.float64).fill_diagonal_(0).unsqueeze(-1)
    lse = torch.zeros(sum(lengths), num_rows, dtype=torch.float64)
    importance = reference.block_importance(q, keys, lse, cu_seqlens(lengths), config, scale=1.0)
    return importance[token].T.int().tolist()


@pytest.mark.parametrize(
    ("l", "d", "select", "length", "expected"),
    [
        pytest.param(
            32,
            16,
            64,
            256,
            [
                [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 0],
            ],
            id="defaults",
        ),
        pytest.param(2, 2, 4, 8, [[1, 1, 0, 0], [0, 0, 1, 1]], id="l = d"),
        pytest.param(2, 2, 2, 6, [[1, 0, 0], [0, 1, 0], [0, 0, 1]], id="l = d = l'"),
        pytest.param(4, 2, 2, 8, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], id="l = 2l'"),
        pytest.param(
            4,
            1,
            4,
            12,
            [
                [4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0],
            ],
            id="l = 4d = l'",
        ),
        pytest.param(
            6,
            2,
            4,
            13,
            [
                [2, 1, 0, 0, 0, 0],
                [1, 2, 2, 1, 0, 0],
                [0, 0, 1, 2, 0, 0],
                [0, 0, 0, 0, 0, 0],
            ],
            id="l = 3d, l' = 2d, last block shorter than a stride",
        ),
    ],
)
def test_importance_counts_the_chunks_a_compression_block_shares_with_a_selection_block(l, d, select, length, expected):  # noqa: E741
    config = NSAConfig(compress_block_size=l, compress_stride=d, select_block_size=select)
    assert coefficients(config, [length], length - 1) == expected


def test_importance_starts_anew_with_each_document():
    config = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=4)
    lengths = [5, 0, 11]  # 1, 0 and 4 blocks in 8 rows
    none = [0, 0, 0, 0, 0, 0, 0, 0]
    assert coefficients(config, lengths, 4) == [[2, 0, 0, 0, 0, 0, 0, 0], none, none]
    assert coefficients(config, lengths, 5 + 2) == [none, none, none]
    assert coefficients(config, lengths, 5 + 5) == [[0, 2, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], none]
    assert coefficients(config, lengths, 5 + 10) == [
        [0, 2, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 2, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
    ]


def test_importance_adds_the_probabilities_of_the_group():
    """Defaults, two groups of two heads; p[i] of head h is (h + 1) · (i + 1), so that block 1 has 48 · (h + 1)."""
    p = torch.arange(1.0, 16.0, dtype=torch.float64)
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log().view(1, 4, 1).expand(256, 4, 1)
    q = torch.cat([q, torch.ones_like(q)], -1)  # [T, 4, 2]
    keys = torch.stack([torch.ones_like(p), p.log()], -1)[:, None].expand(15, 2, 2)
    keys = torch.cat([keys, keys[:1]])  # 16 rows, the last unused
    lse = torch.zeros(256, 4, dtype=torch.float64)
    importance = reference.block_importance(q, keys, lse, cu_seqlens([256]), NSAConfig(), scale=1.0)
    blocks = torch.tensor([16.0, 48.0, 80.0, 96.0], dtype=torch.float64)
    torch.testing.assert_close(importance[-1], torch.stack([(1 + 2) * blocks, (3 + 4) * blocks]))


@pytest.mark.parametrize("config", RANKINGS)
def test_importance_of_all_blocks_counts_every_visible_probability_once_a_chunk(config):
    inputs = random_inputs([7, 50], config)
    compressed_k, _, lse = compressed(inputs, config)
    importance = reference.block_importance(inputs.q, compressed_k, lse, inputs.cu_seqlens, config)
    chunks = config.compress_block_size // config.compress_stride
    total = torch.zeros(57, 2, dtype=torch.float64)
    for t in range(57):
        position = t if t < 7 else t - 7
        total[t] = 2 * chunks if position >= config.compress_block_size - 1 else 0  # two heads a group
    torch.testing.assert_close(importance.sum(-1), total)


@pytest.mark.parametrize("config", RANKINGS)
def test_forced_blocks_come_first_and_then_the_most_important(config):
    lengths = [*PACKINGS["twice_the_reach"], 1, 0, 9, 40]
    inputs = random_inputs(lengths, config)
    compressed_k, _, lse = compressed(inputs, config)
    importance = reference.block_importance(inputs.q, compressed_k, lse, inputs.cu_seqlens, config)
    block_indices = reference.block_selection(inputs.q, compressed_k, lse, inputs.cu_seqlens, config)
    assert block_indices.shape == (sum(lengths), 2, config.num_selected_blocks)
    assert block_indices.dtype == torch.int32
    chosen, ranked = chosen_sets(block_indices), 0  # ascending, none twice, -1 at the end
    for start, end in pairwise(inputs.cu_seqlens.tolist()):
        for t in range(end - start):
            own = t // config.select_block_size
            init = set(range(min(config.num_init_blocks, own + 1)))
            local = set(range(max(own - config.num_local_blocks + 1, 0), own + 1))
            for g, blocks in enumerate(chosen[start + t]):
                assert own in blocks
                assert init | local <= blocks
                assert max(blocks) <= own
                assert len(blocks) == min(config.num_selected_blocks, own + 1)
                free, left = blocks - init - local, set(range(own + 1)) - blocks
                if free and left:
                    score = importance[start + t, g]
                    assert min(score[list(free)]) > max(score[list(left)])
                    ranked += 1
    assert ranked or config.num_selected_blocks in {1, 3, 64}


def test_forced_blocks_are_chosen_whatever_their_importance():
    inputs = random_inputs([67])
    compressed_k, _, lse = compressed(inputs, SMALL)
    importance = reference.block_importance(inputs.q, compressed_k, lse, inputs.cu_seqlens, SMALL)
    best = importance[40:].topk(4).indices  # queries with more blocks than are selected
    beaten = (best != 0).all(-1)
    assert beaten.any()
    block_indices = reference.block_selection(inputs.q, compressed_k, lse, inputs.cu_seqlens, SMALL)
    assert (block_indices[..., 0] == 0).all()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SMALL, [0, 1, 7, 8]),
        (replace(SMALL, num_selected_blocks=5), [0, 1, 2, 7, 8]),
        (replace(SMALL, num_selected_blocks=6), [0, 1, 2, 3, 7, 8]),
        (replace(SMALL, num_init_blocks=0), [1, 2, 7, 8]),  # block 0 has 7/8 of the others' importance
        (replace(SMALL, num_init_blocks=0, num_selected_blocks=9), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (replace(SMALL, num_init_blocks=0, num_local_blocks=1, num_selected_blocks=3), [1, 2, 8]),
        (replace(SMALL, num_selected_blocks=3), [0, 7, 8]),
        (replace(SMALL, num_selected_blocks=11), [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1]),
    ],
)
def test_ties_go_to_the_lower_index(config, expected):
    """A query of zeros spreads its attention evenly: blocks 1 to 7 of 9 tie exactly."""
    q = torch.zeros(72, 2, 3, dtype=torch.float64)
    keys = torch.randn(36, 1, 3, dtype=torch.float64)
    _, lse = reference.compressed_attention(q, keys, keys, cu_seqlens([72]), config)
    importance = reference.block_importance(q, keys, lse, cu_seqlens([72]), config)
    assert importance[-1, 0, 1:8].unique().numel() == 1
    block_indices = reference.block_selection(q, keys, lse, cu_seqlens([72]), config)
    assert block_indices[-1, 0].tolist() == expected


def test_selected_blocks_before_any_visible_compression_block():
    """With l > l' a query may see three selection blocks and no compression block: all scores are 0."""
    config = NSAConfig(
        compress_block_size=8, compress_stride=2, select_block_size=2, num_selected_blocks=2, num_local_blocks=1
    )
    q, keys = torch.randn(7, 1, 3), torch.randn(3, 1, 3)
    block_indices = reference.block_selection(q, keys, torch.zeros(7, 1), cu_seqlens([7]), config)
    assert block_indices[:, 0].tolist() == [[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 3]]


def test_all_heads_of_a_group_share_their_blocks_and_groups_choose_alone():
    inputs = random_inputs([67], num_heads=6, num_kv_heads=2)
    chosen = chosen_sets(attend(inputs, SMALL).block_indices)
    assert {len(query) for query in chosen} == {2}
    assert any(first != second for first, second in chosen)


def test_choices_may_differ_only_where_importance_ties():
    expected = torch.tensor([[[0, 1, 4]], [[0, 2, 4]]], dtype=torch.int32)
    actual = torch.tensor([[[0, 1, 4]], [[0, 3, 4]]], dtype=torch.int32)
    importance = torch.tensor([[[0.0, 1.0, 1.0, 2.0, 0.0]], [[0.0, 1.0, 1.5, 1.5 + 1e-7, 0.0]]], dtype=torch.float64)
    assert assert_same_blocks(actual, expected, importance, tolerance=1e-6) == 1
    assert assert_same_blocks(expected, expected, importance, tolerance=0.0) == 0
    with pytest.raises(AssertionError, match=r"query 1, KV head 0: chose \[0, 3, 4\], expected \[0, 2, 4\]"):
        assert_same_blocks(actual, expected, importance, tolerance=1e-8)
    fewer = torch.tensor([[[0, 1, 4]], [[0, 4, -1]]], dtype=torch.int32)
    with pytest.raises(AssertionError, match="query 1"):
        assert_same_blocks(fewer, expected, importance, tolerance=10.0)
    for broken in ([0, 0, 4], [0, -1, 4], [4, 1, 0]):
        with pytest.raises(AssertionError, match="not ascending"):
            chosen_sets(torch.tensor([[broken]]))
