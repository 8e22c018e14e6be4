"""The whole reference: documents, gates, heads, scale and dtypes."""

import pytest
import torch
from nsa_kernels import reference
from support.packings import PACKINGS, SMALL, one_document, random_inputs
from support.reference import COMPRESSED, SELECTED, SLIDING, attend, compressed, only


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) > 1])
def test_packing_is_invisible(name):
    inputs = random_inputs(PACKINGS[name])
    leaves = list(inputs.leaves().values())
    packed = attend(inputs, SMALL)
    cotangent = torch.randn(packed.out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    documents = [one_document(inputs, i, SMALL) for i, length in enumerate(PACKINGS[name]) if length]
    alone = [attend(document, SMALL) for document in documents]
    out = torch.cat([document.out for document in alone])
    torch.testing.assert_close(packed.out, out, rtol=1e-12, atol=1e-12)
    assert torch.equal(packed.block_indices, torch.cat([document.block_indices for document in alone]))
    grads, expected = (
        torch.autograd.grad(o, leaves, cotangent, allow_unused=True, materialize_grads=True) for o in (packed.out, out)
    )
    for leaf_name, grad, expected_grad in zip(inputs.leaves(), grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=leaf_name: f"{n}: {m}")
    assert name != "mixed" or all(grad.any() for grad in grads)


def test_each_gate_weighs_its_branch():
    inputs = random_inputs([5, 40])
    branches = torch.stack([attend(only(branch, inputs), SMALL).out for branch in (COMPRESSED, SELECTED, SLIDING)], -1)
    torch.testing.assert_close(attend(inputs, SMALL).out, (branches * inputs.gates.unsqueeze(-2)).sum(-1))
    assert branches[8:].all()


def test_branches_share_keys_and_values_by_default():
    shared = random_inputs([40], separate=False)
    k, v = shared.k, shared.v
    spelt_out = shared._replace(sliding_k=k, sliding_v=v, compress_k=k, compress_v=v)
    assert torch.equal(attend(shared, SMALL).out, attend(spelt_out, SMALL).out)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (2, 1), (6, 2), (8, 2), (7, 1), (16, 2), (16, 1)])
def test_head_h_belongs_to_kv_head_h_over_g(num_heads, num_kv_heads):
    inputs = random_inputs([3, 37], num_heads=num_heads, num_kv_heads=num_kv_heads)
    out, block_indices = attend(inputs, SMALL)
    G = num_heads // num_kv_heads
    for g in range(num_kv_heads):
        leaves = {
            name: leaf[:, g * G : (g + 1) * G] if name in {"q", "gates"} else leaf[:, g : g + 1]
            for name, leaf in inputs.leaves().items()
            if "." not in name
        }
        weights = {name: leaf[g : g + 1] for name, leaf in inputs.leaves().items() if "." in name}
        alone = attend(inputs.replace_leaves(leaves | weights), SMALL)
        torch.testing.assert_close(out[:, g * G : (g + 1) * G], alone.out)
        assert torch.equal(block_indices[:, g : g + 1], alone.block_indices)


def test_scale_is_one_over_the_root_of_the_key_dimension_by_default():
    inputs = random_inputs([40], qk_dim=4)
    default = attend(inputs, SMALL).out
    arguments = inputs._asdict()
    assert torch.equal(default, reference.native_sparse_attention(**arguments, config=SMALL, scale=0.5).out)
    doubled = reference.native_sparse_attention(**(arguments | {"q": 2 * inputs.q}), config=SMALL, scale=0.25).out
    torch.testing.assert_close(default, doubled)
    assert not torch.allclose(default, reference.native_sparse_attention(**arguments, config=SMALL, scale=1.0).out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_keep_the_dtype_of_the_inputs_and_lse_is_at_least_float32(dtype):
    inputs = random_inputs([5, 30], dtype=dtype)
    compressed_k, compressed_v, lse = compressed(inputs, SMALL)
    _, selected_lse = reference.selected_attention(
        inputs.q, inputs.k, inputs.v, attend(inputs, SMALL).block_indices, inputs.cu_seqlens, SMALL
    )
    _, sliding_lse = reference.sliding_attention(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, 6)
    assert {compressed_k.dtype, compressed_v.dtype, attend(inputs, SMALL).out.dtype} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {lse.dtype, selected_lse.dtype, sliding_lse.dtype} == {wide}


def test_query_heads_must_be_a_multiple_of_kv_heads():
    inputs = random_inputs([9], num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="multiple of key/value heads, got 3 and 2"):
        attend(inputs, SMALL)
    block_indices = torch.zeros(9, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of key/value heads, got 3 and 2"):
        reference.selected_attention(inputs.q, inputs.k, inputs.v, block_indices, inputs.cu_seqlens, SMALL)
