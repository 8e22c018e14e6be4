"""Summaries of blocks that new tokens complete, against those of whole documents."""

import pytest
import torch
from nsa_kernels import NSAConfig, reference
from nsa_kernels.decode import summarise_blocks
from nsa_kernels.rotary import apply_rotary
from support.measured import assert_strays_at_most_twice_as_far
from support.packings import SMALL, cu_seqlens
from support.pending import PendingTokens

UNEVEN = NSAConfig(compress_block_size=12, compress_stride=4, select_block_size=8, num_selected_blocks=4, window_size=6)
LENGTHS = [1, 3, 4, 5, 6, 11, 12, 13, 16, 20, 22, 24, 36, 37, 40, 8, 28, 48]  # more than one tile of sequences
NARROW, WIDE = (2, 6, 5), (2, 80, 48)  # H_kv, D_qk, D_v

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("config", [SMALL, UNEVEN], ids=["small", "uneven"])
def test_a_block_is_summarised_as_in_the_whole_document_and_no_other_row_changes(config, kind):
    case = PendingTokens(LENGTHS, config, NARROW, kind, hidden_size=9)
    cos, sin = case.rotary
    results = case.summarised("eager")
    for side, result in enumerate(results.values()):
        expected = case.summaries[side].clone()
        for b, (length, block) in enumerate(zip(LENGTHS, case.blocks.tolist(), strict=True)):
            if block >= 0:
                weights = None if case.weights is None else case.weights[side]
                document = case.documents[side][b, :length], cu_seqlens([length])
                row = reference.compress(*document, config, weights)[block : block + 1]
                expected[b, block] = row[0] if side else apply_rotary(row, cos[b : b + 1], sin[b : b + 1])[0]
        torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
        assert 5 <= (result != case.summaries[side]).flatten(1).any(1).sum() < len(LENGTHS)


@interpreted
@pytest.mark.parametrize(
    ("config", "shape", "kind", "hidden_size", "dtype"),
    [
        (UNEVEN, WIDE, "mlp", 100, torch.float32),
        (UNEVEN, WIDE, "linear", None, torch.float32),
        (UNEVEN, WIDE, "mean", None, torch.float32),
        (SMALL, (1, 16, 16), "mlp", None, torch.float16),
    ],
)
def test_kernels_summarise_as_eager(config, shape, kind, hidden_size, dtype):
    case = PendingTokens(LENGTHS, config, shape, kind, hidden_size, dtype)
    results = case.summarised("triton"), case.summarised("eager"), case.summarised("eager", torch.float64)
    assert assert_strays_at_most_twice_as_far(*results, torch.finfo(dtype).eps) == {"keys", "values"}
    case.assert_no_other_row_changed(results[0])
    for result, before in zip(results[0].values(), case.summaries, strict=True):
        assert not torch.equal(result, before)


@interpreted
def test_sequences_that_complete_no_block_write_nothing():
    case = PendingTokens([1, 3, 5, 7], SMALL, (1, 16, 16), dtype=torch.float32)
    assert case.blocks.tolist() == [-1] * 4
    for result, before in zip(case.summarised("triton").values(), case.summaries, strict=True):
        assert torch.equal(result, before)


def test_summaries_that_do_not_fit_are_refused_by_name():
    case = PendingTokens(LENGTHS, SMALL, NARROW)

    def summarised(*, pending=case.pending, summaries=case.summaries, blocks=case.blocks):
        summarise_blocks(pending, summaries, blocks, SMALL.compress_stride, case.weights, case.rotary)

    (k, v), (rows_k, rows_v) = case.pending, case.summaries
    for broken, message in (
        ({"blocks": case.blocks[1:]}, r"blocks must be \(18,\) here, got \(17,\)"),
        ({"pending": (k, v[:, 1:])}, r"pending values must be \(18, 4, 2, 5\) here, got \(18, 3, 2, 5\)"),
        ({"summaries": (rows_k, rows_v[:, 1:])}, "summaries of values must be"),
        ({"summaries": (rows_k, rows_v.float())}, "summaries must have the dtype of the pending values, torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            summarised(**broken)
    summarised()
