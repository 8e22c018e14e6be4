"""The dense rows that tests on a GPU compare with, against the reference."""

import pytest
import torch
from nsa_kernels import native_sparse_attention, reference
from support.packings import PACKINGS, SMALL, random_inputs
from support.rows import dense_rows, importance_of_rows


@pytest.mark.parametrize("name", ["one_token", "empty_documents_at_both_ends", "mixed"])
def test_rows_computed_alone_equal_the_reference(name):
    inputs = random_inputs(PACKINGS[name], kind="mean", rotary=False, num_heads=6, num_kv_heads=2)
    tokens = list(range(0, len(inputs.q), 3))
    result = native_sparse_attention(**inputs._asdict(), config=SMALL, backend="reference")
    keys, values = (reference.compress(x, inputs.cu_seqlens, SMALL) for x in (inputs.compress_k, inputs.compress_v))
    out = dense_rows(inputs, keys, values, result.block_indices, SMALL, tokens)
    torch.testing.assert_close(out, result.out[tokens])
    _, lse = reference.compressed_attention(inputs.q, keys, values, inputs.cu_seqlens, SMALL)
    expected = reference.block_importance(inputs.q, keys, lse, inputs.cu_seqlens, SMALL)
    importance = importance_of_rows(inputs.q, keys, inputs.cu_seqlens, SMALL, tokens)
    torch.testing.assert_close(importance, expected[tokens])
    assert out.any()
