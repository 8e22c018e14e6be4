import pytest
import torch
from support.packings import cu_seqlens

from nsa_lightning.model.fused_attention import chunk_causal_attention, packed_causal_attention


def masked_attention(q, k, v, offsets, window_size):
    """Softmax attention with an explicit T × T mask."""
    token = torch.arange(len(q))
    document = torch.bucketize(token, offsets[1:].long(), right=True)
    distance = token[:, None] - token
    mask = (document[:, None] == document) & (distance >= 0)
    if window_size is not None:
        mask &= distance < window_size
    group_size = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group_size, 1), v.repeat_interleave(group_size, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("window_size", [None, 1, 4, 7, 100])
@pytest.mark.parametrize("lengths", [[1], [13], [1, 0, 9, 4, 3, 17]])
@pytest.mark.parametrize(("heads", "v_dim"), [((4, 4), 8), ((6, 2), 8), ((4, 1), 6)])
def test_equals_masked_attention_with_its_gradients(lengths, window_size, heads, v_dim):
    T, (H, H_kv) = sum(lengths), heads
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(T, h, d, dtype=torch.float64, generator=generator, requires_grad=True)
        for h, d in ((H, 8), (H_kv, 8), (H_kv, v_dim))
    ]
    offsets = cu_seqlens(lengths)
    actual = packed_causal_attention(*inputs, offsets, max(lengths), window_size)
    expected = masked_attention(*inputs, offsets, window_size)
    torch.testing.assert_close(actual, expected)
    grad_out = torch.randn_like(expected)
    for gradient, expected_gradient in zip(
        torch.autograd.grad(actual, inputs, grad_out), torch.autograd.grad(expected, inputs, grad_out), strict=True
    ):
        torch.testing.assert_close(gradient, expected_gradient)
    assert actual.shape == (T, H, v_dim)


@pytest.mark.parametrize("window_size", [None, 1, 4, 5, 7, 100])
@pytest.mark.parametrize("num_queries", [1, 4, 5, 13])
def test_the_last_queries_of_a_document_see_all_of_it(num_queries, window_size, monkeypatch):
    monkeypatch.setattr("nsa_lightning.model.fused_attention.MASKED_QUERIES", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(13, h, d, dtype=torch.float64, generator=generator) for h, d in ((6, 8), (2, 8), (2, 6)))
    expected = masked_attention(q, k, v, cu_seqlens([13]), window_size)[-num_queries:]
    seen = 13 if window_size is None else min(13, num_queries + window_size - 1)
    for held in {seen, 13}:
        actual = chunk_causal_attention(q[-num_queries:], k[-held:], v[-held:], window_size)
        torch.testing.assert_close(actual, expected)
