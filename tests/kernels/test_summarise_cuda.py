"""Steps that append their token on a GPU: right numbers in every dtype and shape, the same from a CUDA graph."""

import pytest
import torch
from nsa_kernels import NSAConfig
from nsa_kernels.decode.attention import decode_attention
from support.gpu import DTYPES, epsilon, refusing_to_wait
from support.measured import assert_strays_at_most_twice_as_far
from support.token_by_token import GrowingSequences

from nsa_lightning.generation.cuda_graphs import capture

pytest.importorskip("nsa_kernels.decode.step", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]  # kernels are compiled for each shape

SHAPES = {  # H, H_kv, D_qk, D_v, hidden units of the mlp
    "1B": (32, 8, 64, 64, None),
    "A": (64, 4, 128, 128, None),
    "paper": (64, 4, 192, 128, 256),
    "narrow": (14, 2, 80, 80, 100),
    "wide": (8, 2, 256, 256, 512),
}
CONFIG = NSAConfig()
LENGTHS = [31, 0, 15, 30, 47, 63, 511, 1023, 1100, 1999]


def written(cache, new):
    """Everything that a step writes."""
    return dict(zip("abcdefgh", (*cache, new.compressed.k_slots, new.compressed.v_slots), strict=True))


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_writes_as_rightly_as_eager_and_attends_what_it_wrote(shape, dtype, kind):
    *sizes, hidden_size = SHAPES[shape]
    for lengths in ([1999], LENGTHS, 4 * LENGTHS):
        case = GrowingSequences(lengths, 1, CONFIG, tuple(sizes), kind, hidden_size, DTYPES[dtype], "cuda")
        (result, *actual), (_, *right), (_, *exact) = (
            case.step(backend, cast) for backend, cast in (("triton", None), ("eager", None), ("eager", torch.float64))
        )
        results = [written(*parts) for parts in (actual, right, exact)]
        assert_strays_at_most_twice_as_far(*results, epsilon(DTYPES[dtype]))
        q, gates, *_ = case.new_token()
        rotated = case.rotated_queries(q)
        expected = decode_attention(rotated, gates, actual[0], case.positions + 1, CONFIG, backend="triton")
        alike = (result.block_indices == expected.block_indices).all(-1)
        assert alike.float().mean() > 0.9
        outs = (x.out.unflatten(1, (sizes[1], -1))[alike] for x in (result, expected))
        torch.testing.assert_close(*outs, rtol=4 * epsilon(DTYPES[dtype]), atol=4 * epsilon(DTYPES[dtype]))


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_a_graph_captured_at_one_length_takes_any_and_waits_for_nothing(kind):
    case = GrowingSequences([5] * 10, 1, CONFIG, (32, 8, 64, 64), kind, dtype=torch.bfloat16, device="cuda")
    other = GrowingSequences(LENGTHS, 1, CONFIG, (32, 8, 64, 64), kind, dtype=torch.bfloat16, device="cuda")
    q, gates, cache, new = other.new_token()
    positions = case.positions + 1
    before = [x.clone() for x in (*cache, *new.started)]
    graph = capture(lambda: decode_attention(q, gates, cache, positions, CONFIG, new=new, backend="triton"))
    for x, old in zip((*cache, *new.started), before, strict=True):
        x.copy_(old)
    positions.copy_(other.positions + 1)
    with refusing_to_wait():
        replayed = graph.replay()
    result, right_cache, right = other.step("triton")
    for actual, expected in zip((*replayed, *cache), (*result, *right_cache), strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(new.started, right.started, strict=True):
        assert torch.equal(actual, expected)
