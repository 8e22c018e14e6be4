"""The reference's three branches against dense attention, in float64."""

import pytest
import torch
from nsa_kernels import reference
from support.packings import PACKINGS, SMALL, random_inputs
from support.reference import COMPRESSED, SELECTED, SLIDING, attend, compressed, dense, only


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) == 1])
def test_compressed_branch_sees_the_blocks_wholly_in_the_past_or_present(name):
    inputs = random_inputs(PACKINGS[name])
    compressed_k, compressed_v, _ = compressed(inputs, SMALL)
    o, lse = reference.compressed_attention(inputs.q, compressed_k, compressed_v, inputs.cu_seqlens, SMALL)
    last_token = torch.arange(len(compressed_k)) * 2 + 3
    mask = last_token <= torch.arange(len(inputs.q))[:, None]  # [T, C]
    seen = mask.any(1)
    torch.testing.assert_close(o[seen], dense(inputs.q[seen], compressed_k, compressed_v, mask[seen]))
    assert int(seen.sum()) == max(len(inputs.q) - 3, 0)
    scores = torch.einsum("tkgd,ckd->tkgc", inputs.q.unflatten(1, (2, 2)), compressed_k).flatten(1, 2) / 6**0.5
    expected = scores.masked_fill(~mask[:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse[seen], expected[seen])


def test_a_query_that_sees_no_block_has_zero_output_and_zero_gradients():
    inputs = random_inputs([3, 1, 9], rotary=False)
    compressed_k, compressed_v, _ = (x.detach().requires_grad_() for x in compressed(inputs, SMALL))
    o, lse = reference.compressed_attention(inputs.q, compressed_k, compressed_v, inputs.cu_seqlens, SMALL)
    blind = [0, 1, 2, 3, 4, 5, 6]  # 3 + 1 tokens of the short documents, 3 of the long one
    assert not o[blind].any()
    assert not lse[blind].any()
    leaves = [inputs.q, compressed_k, compressed_v]
    for grad in torch.autograd.grad(o[blind].sum() + lse[blind].sum(), leaves, retain_graph=True):
        assert torch.equal(grad, torch.zeros_like(grad))
    for grad in torch.autograd.grad(o.square().sum() + lse.sum(), leaves):
        assert grad.isfinite().all()
        assert grad.any()
    assert o[7:].all()


def test_documents_without_a_block_leave_the_other_two_branches():
    inputs = random_inputs(PACKINGS["all_shorter_than_a_compress_block"])
    gates = inputs.gates.detach().clone()
    gates[..., COMPRESSED] = 0
    out = attend(inputs, SMALL).out
    assert torch.equal(out, attend(inputs._replace(gates=gates), SMALL).out)
    leaves = list(inputs.leaves().values())
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert out.any()


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) == 1])
def test_selected_branch_is_full_attention_exactly_up_to_n_blocks(name):
    inputs = only(SELECTED, random_inputs(PACKINGS[name]))
    out = attend(inputs, SMALL).out
    expected = dense(inputs.q, inputs.k, inputs.v)
    reach = SMALL.selected_tokens
    torch.testing.assert_close(out[:reach], expected[:reach], rtol=1e-12, atol=1e-12)
    if len(out) > reach:
        assert not torch.isclose(out[reach:], expected[reach:]).any()


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) == 1])
def test_sliding_branch_is_full_attention_exactly_up_to_the_window(name):
    inputs = only(SLIDING, random_inputs(PACKINGS[name]))
    out = attend(inputs, SMALL).out
    expected = dense(inputs.q, inputs.sliding_k, inputs.sliding_v)
    window = SMALL.window_size
    torch.testing.assert_close(out[:window], expected[:window], rtol=1e-12, atol=1e-12)
    if len(out) > window:
        assert not torch.isclose(out[window:], expected[window:]).any()


@pytest.mark.parametrize("window_size", [1, 2, 6, 40])
def test_sliding_window_counts_the_query_itself(window_size):
    inputs = random_inputs([23])
    o, lse = reference.sliding_attention(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, window_size)
    mask = torch.ones(23, 23, dtype=torch.bool).tril() & ~torch.ones(23, 23, dtype=torch.bool).tril(-window_size)
    torch.testing.assert_close(o, dense(inputs.q, inputs.k, inputs.v, mask))
    assert int(mask[-1].sum()) == min(window_size, 23)
    scores = torch.einsum("tkgd,skd->tkgs", inputs.q.unflatten(1, (2, 2)), inputs.k).flatten(1, 2) / 6**0.5
    torch.testing.assert_close(lse, scores.masked_fill(~mask[:, None], float("-inf")).logsumexp(-1))


def test_selected_branch_attends_to_the_past_tokens_of_the_given_blocks():
    inputs = random_inputs([5, 43])
    generator = torch.Generator().manual_seed(0)
    block_indices = torch.full((48, 2, 3), -1, dtype=torch.int32)
    mask = torch.zeros(4, 43, 43, dtype=torch.bool)
    for t in range(5):
        block_indices[t, :, 0] = 0
    for t in range(43):
        for g in range(2):
            earlier = torch.randperm(t // 8, generator=generator)[:2].tolist()
            for slot, j in enumerate(sorted([*earlier, t // 8])):
                block_indices[5 + t, g, slot] = j
                mask[2 * g : 2 * g + 2, t, 8 * j : min(8 * j + 8, t + 1)] = True
    o, lse = reference.selected_attention(inputs.q, inputs.k, inputs.v, block_indices, inputs.cu_seqlens, SMALL)
    torch.testing.assert_close(o[:5], dense(inputs.q[:5], inputs.k[:5], inputs.v[:5]))
    torch.testing.assert_close(o[5:], dense(inputs.q[5:], inputs.k[5:], inputs.v[5:], mask))
    scores = torch.einsum("tkgd,skd->kgts", inputs.q[5:].unflatten(1, (2, 2)), inputs.k[5:]).flatten(0, 1) / 6**0.5
    torch.testing.assert_close(lse[5:].T, scores.masked_fill(~mask, float("-inf")).logsumexp(-1))
    assert not mask.sum(-1).eq(torch.arange(1, 44)).all()  # some block is left out


def test_given_blocks_are_used_instead_of_ranking():
    inputs = random_inputs([67])
    own_only = torch.full((67, 2, 1), -1, dtype=torch.int32)
    own_only[:, :, 0] = (torch.arange(67) // 8)[:, None]
    out, block_indices = attend(only(SELECTED, inputs), SMALL, own_only)
    torch.testing.assert_close(out[64:], dense(inputs.q[64:], inputs.k[64:], inputs.v[64:]))
    assert torch.equal(block_indices, own_only)
