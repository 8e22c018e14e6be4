import numpy as np
import pytest
import torch
from nsa_kernels.eager import block_selection, compress, compressed_attention
from support.packings import PACKINGS, SMALL, cu_seqlens

from nsa_lightning.benchmark.cases import Shape
from nsa_lightning.benchmark.floors import Pairs, Work, count_pairs, floor_ms, stage_work
from nsa_lightning.benchmark.timing import Ceilings
from nsa_lightning.model.attention.pairs import num_summaries

SHAPE = Shape("test", 6, 2, 8, 4)


def brute_force_pairs(lengths, blocks):
    """Pairs by looking at every query and key."""
    l, d, size = SMALL.compress_block_size, SMALL.compress_stride, SMALL.select_block_size  # noqa: E741
    compressed = selected = sliding = token = 0
    for length in lengths:
        for t in range(length):
            compressed += sum(i * d + l - 1 <= t for i in range(length) if i * d + l <= length)
            sliding += sum(t - SMALL.window_size < s <= t for s in range(length))
            for head in blocks[token].tolist():
                selected += sum(s <= t for j in head if j >= 0 for s in range(j * size, (j + 1) * size))
            token += 1
    return Pairs(compressed * SHAPE.num_heads, selected * SHAPE.group_size, sliding * SHAPE.num_heads)


@pytest.mark.parametrize("name", ["mixed", "all_shorter_than_a_compress_block", "twice_the_reach"])
def test_pairs_equal_a_count_of_every_query_and_key(name):
    lengths = PACKINGS[name]
    offsets, T = cu_seqlens(lengths), sum(lengths)
    q, k = torch.randn(T, SHAPE.num_heads, SHAPE.qk_dim), torch.randn(T, SHAPE.num_kv_heads, SHAPE.qk_dim)
    keys = compress(k, offsets, SMALL)
    _, lse = compressed_attention(q, keys, keys, offsets, SMALL)
    blocks = block_selection(q, keys, lse, offsets, SMALL)
    pairs = count_pairs(SHAPE, lengths, blocks, offsets, SMALL)
    assert pairs == brute_force_pairs(lengths, blocks)
    assert pairs.selected >= pairs.sliding > 0


def test_a_stage_reads_and_writes_everything_once():
    lengths = [100, 7]
    C = int(num_summaries(SMALL, np.array(lengths)).sum())
    work = stage_work(SHAPE, lengths, Pairs(10, 20, 30), SMALL, element_size=2)
    q, o, kv, lse = 107 * 6 * 8 * 2, 107 * 6 * 4 * 2, 107 * 2 * 12 * 2, 107 * 6 * 4
    assert work["sliding_attention"].forward == Work(30 * 2 * 12, q + kv + o + lse)
    assert work["sliding_attention"].backward == Work(30 * 2 * (3 * 8 + 2 * 4), 2 * q + 2 * kv + 2 * o + lse)
    assert work["compress"].forward == Work(0, kv + C * 2 * 12 * 2)
    assert work["block_selection"].forward.flops == 10 * 2 * 8
    assert work["block_selection"].backward is None
    indices = 107 * 2 * SMALL.num_selected_blocks * 4
    assert work["selected_attention"].forward.num_bytes == q + kv + o + lse + indices


def test_the_floor_is_the_slower_of_products_and_copies():
    ceilings = Ceilings(matmul_flops=1e12, copy_bytes=1e9)
    assert floor_ms(Work(5e12, 1e9), ceilings) == pytest.approx(5000)
    assert floor_ms(Work(5e12, 8e9), ceilings) == pytest.approx(8000)
