"""Summaries of completed blocks on a GPU: right numbers in every dtype and shape, the same from a CUDA graph."""

import pytest
import torch
from nsa_kernels import NSAConfig
from nsa_kernels.decode import summarise_blocks
from support.gpu import DTYPES, epsilon, refusing_to_wait
from support.measured import assert_strays_at_most_twice_as_far
from support.pending import PendingTokens

from nsa_lightning.generation.cuda_graphs import capture

pytest.importorskip("nsa_kernels.summarise_triton", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]  # kernels are compiled for each shape

SHAPES = {  # H_kv, D_qk, D_v, hidden units of the mlp
    "1B": (8, 64, 64, None),
    "A": (4, 128, 128, None),
    "paper": (4, 192, 128, 256),
    "narrow": (2, 80, 80, 100),
    "wide": (2, 256, 256, 512),
}
CONFIG = NSAConfig()
LENGTHS = [32, 31, 33, 1, 48, 50, 64, 100, 512, 1024]
BATCHES = {1: [64], 10: LENGTHS, 40: 4 * LENGTHS}


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_summaries_are_as_right_as_eager_and_no_other_row_changes(shape, dtype, kind):
    *sizes, hidden_size = SHAPES[shape]
    for lengths in BATCHES.values():
        case = PendingTokens(lengths, CONFIG, tuple(sizes), kind, hidden_size, DTYPES[dtype], "cuda")
        results = case.summarised("triton"), case.summarised("eager"), case.summarised("eager", torch.float64)
        assert assert_strays_at_most_twice_as_far(*results, epsilon(DTYPES[dtype])) == {"keys", "values"}
        case.assert_no_other_row_changed(results[0])


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_a_graph_captured_where_no_block_ends_summarises_any(kind):
    case = PendingTokens([2000] * 20, CONFIG, (8, 64, 64), kind, dtype=torch.bfloat16, device="cuda")
    case.set_lengths([5] * 20)
    summaries = tuple(x.clone() for x in case.summaries)
    args = case.blocks, CONFIG.compress_stride, case.weights, case.rotary
    graph = capture(lambda: summarise_blocks(case.pending, summaries, *args, backend="triton"))
    for lengths in ([31] * 20, [32] * 20, [16 * i for i in range(2, 22)], [2000] + 19 * [77]):
        case.set_lengths(lengths)
        expected = [x.clone() for x in summaries]
        summarise_blocks(case.pending, expected, *args, backend="triton")
        before = [x.clone() for x in summaries]
        graph.replay()
        for actual, right, old in zip(summaries, expected, before, strict=True):
            assert torch.equal(actual, right)
            assert torch.equal(actual, old) == (case.blocks < 0).all().item()


def test_two_runs_are_equal_and_wait_for_nothing():
    case = PendingTokens(LENGTHS, CONFIG, (8, 64, 64), dtype=torch.bfloat16, device="cuda")
    pairs, pending = [tuple(x.clone() for x in case.summaries) for _ in range(2)], case.pending
    args = case.blocks, CONFIG.compress_stride, case.weights, case.rotary
    summarise_blocks(pending, pairs[0], *args, backend="triton")  # compiles the kernels
    torch.cuda.synchronize()
    with refusing_to_wait():
        summarise_blocks(pending, pairs[1], *args, backend="triton")
    for one, other, before in zip(*pairs, case.summaries, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, before)
