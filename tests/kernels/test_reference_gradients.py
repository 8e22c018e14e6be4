"""The reference's gradients against finite differences, in float64."""

from dataclasses import replace

import pytest
import torch
from nsa_kernels import reference
from nsa_kernels.geometry import CompressionWeights
from support.packings import chosen_sets, cu_seqlens, random_inputs, random_weights
from support.reference import SELECTED, TINY, TINY_LENGTHS, attend, compressed, only
from torch import Tensor


def gradcheck(function, leaves: list[Tensor], fast_mode: bool = False) -> bool:
    return torch.autograd.gradcheck(function, leaves, fast_mode=fast_mode)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_gradients_of_compress_match_finite_differences(kind):
    config = replace(TINY, compress_block_size=2, compress_stride=1)
    weights = random_weights(kind, 2, 2, config, torch.Generator().manual_seed(0))
    parts = [part.requires_grad_() for part in weights or () if part is not None]
    x = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *parts):
        return reference.compress(x, cu_seqlens([1, 5]), config, CompressionWeights(*parts) if parts else None)

    assert gradcheck(function, [x, *parts])
    assert len(parts) == {"mean": 0, "linear": 3, "mlp": 5}[kind]


def test_gradients_of_compressed_attention_match_finite_differences():
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=2, num_kv_heads=1, qk_dim=2, v_dim=1, kind="mean")
    compressed_k, compressed_v, _ = (x.detach().requires_grad_() for x in compressed(inputs, TINY))

    def function(q, k, v):
        return reference.compressed_attention(q, k, v, inputs.cu_seqlens, TINY)

    assert gradcheck(function, [inputs.q, compressed_k, compressed_v])


@pytest.mark.slow
def test_gradients_of_selected_attention_match_finite_differences():
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=4, num_kv_heads=2, qk_dim=1, v_dim=1, kind="mean")
    block_indices = attend(inputs, TINY).block_indices

    def function(q, k, v):
        return reference.selected_attention(q, k, v, block_indices, inputs.cu_seqlens, TINY)

    assert gradcheck(function, [inputs.q, inputs.k, inputs.v])
    assert any(len(blocks) < 4 for blocks, _ in chosen_sets(block_indices)[-2:])  # one block of the last is left out


def test_gradients_of_sliding_attention_match_finite_differences():
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=2, num_kv_heads=1, qk_dim=2, v_dim=1, kind="mean")

    def function(q, k, v):
        return reference.sliding_attention(q, k, v, inputs.cu_seqlens, TINY.window_size)

    assert gradcheck(function, [inputs.q, inputs.k, inputs.v])


@pytest.mark.slow
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_gradients_of_every_input_match_finite_differences(kind, separate):
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=4, num_kv_heads=2, kind=kind, separate=separate)
    leaves = inputs.leaves()

    def function(*tensors):
        return attend(inputs.replace_leaves(dict(zip(leaves, tensors, strict=True))), TINY).out

    assert gradcheck(function, list(leaves.values()), fast_mode=True)
    grads = torch.autograd.grad(function(*leaves.values()).square().sum(), list(leaves.values()))
    assert all(grad.count_nonzero() for grad in grads)


def test_no_gradient_passes_through_the_choice_of_blocks():
    inputs = only(SELECTED, random_inputs(TINY_LENGTHS, TINY))
    out, block_indices = attend(inputs, TINY)
    leaves = {name: leaf for name, leaf in inputs.leaves().items() if name != "gates"}
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert not block_indices.requires_grad
    for name, grad in zip(leaves, grads, strict=True):
        assert bool(grad.count_nonzero()) == (name in {"q", "k", "v"}), name
