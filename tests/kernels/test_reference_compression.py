"""The reference's block summaries against hand-computed numbers."""

import math
from dataclasses import replace

import pytest
import torch
from nsa_kernels import reference
from nsa_kernels.geometry import CompressionWeights
from nsa_kernels.rotary import apply_rotary
from support.packings import PACKINGS, SMALL, cu_seqlens, random_inputs, random_weights
from support.reference import COMPRESSED, SELECTED, SLIDING, attend, compressed, only


def test_mean_kind_averages_each_complete_block():
    x = torch.arange(9.0).view(9, 1, 1)
    summaries = reference.compress(x, cu_seqlens([3, 6]), SMALL)
    assert summaries.flatten().tolist() == [(3 + 4 + 5 + 6) / 4, (5 + 6 + 7 + 8) / 4, 0, 0]


@pytest.mark.parametrize("name", PACKINGS)
def test_summaries_lie_document_after_document_and_unused_rows_are_zero(name):
    inputs = random_inputs(PACKINGS[name], kind="mean", rotary=False)
    documents = inputs.compress_k.split(PACKINGS[name])
    blocks = [x.unfold(0, 4, 2).mean(-1) for x in documents if len(x) >= 4]
    expected = torch.cat([*blocks, inputs.compress_k.new_zeros(0, 2, 6)])
    summaries = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL)
    assert len(summaries) == max(len(inputs.q) // 2, 1)
    torch.testing.assert_close(summaries[: len(expected)], expected)
    assert not summaries[len(expected) :].any()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_compression_starts_as_the_mean(kind):
    x = random_inputs([21]).compress_k
    weights = random_weights(kind, 2, 6, SMALL, torch.Generator().manual_seed(0))
    last = ("in_weight", "in_bias") if kind == "linear" else ("out_weight", "out_bias")
    start = weights._replace(
        **{name: torch.zeros_like(getattr(weights, name)) for name in (*last, "position_embedding")}
    )
    mean = reference.compress(x, cu_seqlens([21]), SMALL)
    torch.testing.assert_close(reference.compress(x, cu_seqlens([21]), SMALL, start), mean, rtol=0, atol=0)
    assert not torch.allclose(reference.compress(x, cu_seqlens([21]), SMALL, weights), mean)


def test_linear_kind_reads_the_block_token_by_token():
    """in_weight picks dimension 1 of token 1 into output dimension 0, position embedding included there only."""
    config = replace(SMALL, compress_block_size=2, compress_stride=1)
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).unsqueeze(1)
    embedding = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]).unsqueeze(0)
    in_weight = torch.zeros(1, 6, 3)
    in_weight[0, 1 * 3 + 1, 0] = 1
    weights = CompressionWeights(embedding, in_weight, torch.tensor([[0.0, 0.0, 0.5]]))
    summaries = reference.compress(x, cu_seqlens([2]), config, weights)
    assert summaries[0, 0].tolist() == [2.5 + (5 + 50), 3.5, 4.5 + 0.5]


def test_mlp_kind_has_one_silu_hidden_layer():
    config = replace(SMALL, compress_block_size=2, compress_stride=1)
    weights = CompressionWeights(
        position_embedding=torch.tensor([[[0.0], [1.0]]]),
        in_weight=torch.tensor([[[1.0], [-1.0]]]),
        in_bias=torch.tensor([[0.5]]),
        out_weight=torch.tensor([[[2.0]]]),
        out_bias=torch.tensor([[3.0]]),
    )
    summaries = reference.compress(torch.tensor([[[1.0]], [[3.0]]]), cu_seqlens([2]), config, weights)
    hidden = 1.0 - (3.0 + 1.0) + 0.5  # -2.5
    assert summaries[0, 0, 0].item() == pytest.approx((1 + 3) / 2 + 2 * hidden / (1 + math.exp(-hidden)) + 3)


def test_each_kv_head_has_its_own_compression():
    inputs = random_inputs([21])
    summaries = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL, inputs.k_weights)
    for name, part in inputs.k_weights._asdict().items():
        changed = part.detach().clone()
        changed[0] += 1
        weights = inputs.k_weights._replace(**{name: changed})
        other = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL, weights)
        assert torch.equal(other[:, 1], summaries[:, 1]), name
        assert not torch.allclose(other[:, 0], summaries[:, 0]), name


def test_rotary_turns_the_compressed_keys_only():
    inputs = random_inputs([5, 30])
    compressed_k, compressed_v, _ = compressed(inputs, SMALL)
    rotated = apply_rotary(compressed_k, *inputs.compressed_rotary)
    expected, lse = reference.compressed_attention(inputs.q, rotated, compressed_v, inputs.cu_seqlens, SMALL)
    out, block_indices = attend(only(COMPRESSED, inputs), SMALL)
    torch.testing.assert_close(out, expected)
    chosen = reference.block_selection(inputs.q, rotated, lse, inputs.cu_seqlens, SMALL)
    assert torch.equal(block_indices, chosen)
    unrotated = inputs._replace(compressed_rotary=None)
    assert not torch.allclose(attend(only(COMPRESSED, unrotated), SMALL).out, out)
    for branch in (SELECTED, SLIDING):
        both = [attend(only(branch, x), SMALL, block_indices).out for x in (inputs, unrotated)]
        assert torch.equal(*both)
