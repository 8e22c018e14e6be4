"""The eager backend on a GPU against the reference on the CPU."""

import pytest
import torch
from nsa_kernels import NSAConfig, native_sparse_attention
from support.packings import PACKINGS, SMALL, random_inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["mixed", "empty_documents_at_both_ends"])
def test_eager_on_a_gpu_equals_the_reference(name):
    inputs = random_inputs(PACKINGS[name])
    on_gpu = inputs.to(device="cuda")
    expected = native_sparse_attention(**inputs._asdict(), config=SMALL, backend="reference")
    actual = native_sparse_attention(**on_gpu._asdict(), config=SMALL, backend="eager")
    assert torch.equal(actual.block_indices.cpu(), expected.block_indices)
    torch.testing.assert_close(actual.out.cpu(), expected.out, rtol=1e-9, atol=1e-9)
    expected.out.sum().backward()
    actual.out.sum().backward()
    compared = 0
    for part, leaf in inputs.leaves().items():
        if leaf.grad is not None:
            torch.testing.assert_close(on_gpu.leaves()[part].grad.cpu(), leaf.grad, rtol=1e-8, atol=1e-8)
            compared += 1
    assert compared >= 7


def test_eager_memory_stays_far_below_a_score_matrix():
    config, T = NSAConfig(), 16384
    inputs = random_inputs([T], config, num_heads=8, num_kv_heads=2, qk_dim=64, v_dim=64, kind="mean",
                           dtype=torch.float32).to(device="cuda")  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    native_sparse_attention(**inputs._asdict(), config=config, backend="eager").out.sum().backward()
    score_matrix = 4 * 8 * T * T
    assert torch.cuda.max_memory_allocated() - before < score_matrix / 2
