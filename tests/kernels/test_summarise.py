"""Steps that append their token and carry the summaries on, against whole summaries of whole documents."""

import pytest
import torch
from nsa_kernels import NSAConfig
from nsa_kernels.decode.attention import decode_attention
from support.packings import SMALL
from support.token_by_token import GrowingSequences

UNEVEN = NSAConfig(compress_block_size=12, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6)
APART = NSAConfig(compress_block_size=4, compress_stride=4, select_block_size=4, num_selected_blocks=3, window_size=5)
CONFIGS = {"small": SMALL, "uneven": UNEVEN, "apart": APART}
NARROW, WIDE = (4, 2, 16, 8), (6, 2, 24, 48)  # H, H_kv, D_qk, D_v

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


def assert_steps(case, steps, backend, tolerance):
    ended = 0
    for _ in range(steps):
        result, cache, new = case.step(backend)
        before = [x.clone() for x in case.cache[4:]]
        expected = case.grow()
        ended += any(not torch.equal(x, old) for x, old in zip(case.cache[4:], before, strict=True))
        assert torch.equal(result.block_indices, expected.block_indices)
        torch.testing.assert_close(result.out, expected.out, rtol=tolerance, atol=tolerance)
        written = *cache, new.compressed.k_slots, new.compressed.v_slots
        for actual, right in zip(written, (*case.cache, *case.ring), strict=True):
            torch.testing.assert_close(actual, right, rtol=tolerance, atol=tolerance)
        l, d, S = case.config.compress_block_size, case.config.compress_stride, new.started.k_sum.shape[1]  # noqa: E741
        for b, length in enumerate(case.lengths):
            for block in range(max(0, -(-(length - l + 1) // d)), -(-length // d)):  # started and not ended
                for actual, right in zip(new.started, case.started, strict=True):
                    torch.testing.assert_close(actual[b, block % S], right[b, block % S], rtol=1e-4, atol=1e-4)
        case.started = new.started
    assert ended >= steps // case.config.compress_stride


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("config", CONFIGS)
def test_summaries_carried_on_are_those_of_the_whole_document(config, kind):
    config = CONFIGS[config]
    assert_steps(GrowingSequences([0, 3, 4, 17, 33], 30, config, NARROW, kind, 9), 30, "eager", 1e-6)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("config", CONFIGS)
def test_kernels_carry_summaries_on(config, kind, monkeypatch):
    monkeypatch.setattr("nsa_kernels.decode.summaries.TILE_NUMBERS", 512)  # so that every map takes more than one tile
    config = CONFIGS[config]
    case = GrowingSequences([0, config.compress_block_size - 1, 41], 5, config, WIDE, kind, 20, torch.float32)
    assert_steps(case, 5, "triton", 2e-5)  # the second sequence ends a block in the first step and in the last


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_parts_of_a_new_token_that_do_not_fit_are_refused_by_name(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    case = GrowingSequences([5, 9], 1, SMALL, NARROW, "mlp", 9, torch.float32)
    q, gates, cache, new = case.new_token()

    def stepped(**parts):
        decode_attention(q, gates, cache, case.positions + 1, SMALL, new=new._replace(**parts), backend=backend)

    stepped()
    branch, started = new.branches[0], new.started
    for broken, message in (
        ({"started": started._replace(v_sum=started.v_sum[:, :1])}, r"v_sum must be \(2, 2, 2, 8\) here"),
        ({"started": started._replace(k_mapped=started.k_sum)}, r"k_mapped must be \(2, 2, 2, 9\) here"),
        ({"weights": None}, r"k_mapped must be \(2, 2, 2, 0\) here"),
        ({"compressed": branch}, r"k_slots of the compressed branch must be \(2, 4, 2, 16\) here"),
        ({"branches": [branch._replace(k=branch.k[:1])]}, r"k must be \(2, 2, 16\) here, got \(1, 2, 16\)"),
        ({"branches": [branch._replace(k=branch.k.double())]}, "slots must have the dtype of the keys and values"),
    ):
        with pytest.raises(ValueError, match=message):
            stepped(**broken)
