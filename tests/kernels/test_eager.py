"""The eager backend against the reference: outputs, chosen blocks and every gradient."""

import itertools

import pytest
import torch
from nsa_kernels import NSAConfig, native_sparse_attention, reference
from nsa_kernels.eager import chunks
from nsa_kernels.rotary import apply_rotary
from support.packings import (
    PACKINGS,
    SMALL,
    assert_same_blocks,
    one_document,
    random_inputs,
)

GEOMETRIES = {
    "no_overlap": NSAConfig(
        compress_block_size=4, compress_stride=4, select_block_size=4, num_selected_blocks=3, window_size=5
    ),
    "summary_wider_than_block": NSAConfig(
        compress_block_size=16, compress_stride=2, select_block_size=4, num_selected_blocks=5, window_size=1
    ),
    "no_initial_block": NSAConfig(
        compress_block_size=4,
        compress_stride=2,
        select_block_size=8,
        num_selected_blocks=2,
        num_init_blocks=0,
        num_local_blocks=1,
        window_size=100,
    ),
    "defaults": NSAConfig(),
}


def run(inputs, config, backend, grad_out, block_indices=None):
    """Output, chosen blocks and gradients by name."""
    leaves = inputs.leaves()
    result = native_sparse_attention(**inputs._asdict(), config=config, backend=backend, block_indices=block_indices)
    gradients = torch.autograd.grad(
        result.out, list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True
    )
    return result, dict(zip(leaves, gradients, strict=True))


def assert_equal_to_reference(inputs, config, tolerance=1e-10):
    T, H, _ = inputs.q.shape
    grad_out = torch.randn(T, H, inputs.v.shape[-1], dtype=inputs.q.dtype, generator=torch.Generator().manual_seed(1))
    expected, expected_gradients = run(inputs, config, "reference", grad_out)
    actual, gradients = run(inputs, config, "eager", grad_out)
    assert torch.equal(actual.block_indices, expected.block_indices)
    torch.testing.assert_close(actual.out, expected.out, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, expected_gradients[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert gradients["v"].abs().max() > 0


@pytest.mark.parametrize("name", PACKINGS)
def test_equal_to_the_reference_on_every_packing(name):
    assert_equal_to_reference(random_inputs(PACKINGS[name]), SMALL)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16])
def test_equal_to_the_reference_for_every_group_size(group_size):
    inputs = random_inputs([3, 50, 1, 21], num_heads=2 * group_size, num_kv_heads=2)
    assert_equal_to_reference(inputs, SMALL)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("rotary", [True, False], ids=["rotary", "plain"])
def test_equal_to_the_reference_for_every_kind_of_compression_and_sharing(kind, separate, rotary):
    inputs = random_inputs([40, 5, 12], kind=kind, separate=separate, rotary=rotary)
    assert_equal_to_reference(inputs, SMALL)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_equal_to_the_reference_for_other_geometries(name):
    config = GEOMETRIES[name]
    lengths = [2 * config.select_block_size + 3, 1, config.compress_block_size + config.compress_stride]
    assert_equal_to_reference(random_inputs(lengths, config, kind="linear"), config)


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(64, 64), (80, 80), (192, 128), (8, 16)])
def test_equal_to_the_reference_for_other_head_dimensions(qk_dim, v_dim):
    inputs = random_inputs([37, 2], qk_dim=qk_dim, v_dim=v_dim, kind="mean")
    assert_equal_to_reference(inputs, SMALL)


@pytest.mark.parametrize("budget", [1, 2**12])
def test_the_size_of_a_chunk_changes_nothing(monkeypatch, budget):
    inputs = random_inputs(PACKINGS["mixed"])
    whole = run(inputs, SMALL, "eager", torch.ones_like(inputs.q[..., :1]).expand(-1, -1, inputs.v.shape[-1]))
    monkeypatch.setitem(chunks._CHUNK_BYTES, "cpu", budget)
    assert chunks.chunk_size(torch.device("cpu"), 2**12) == 1
    parts = run(inputs, SMALL, "eager", torch.ones_like(inputs.q[..., :1]).expand(-1, -1, inputs.v.shape[-1]))
    assert torch.equal(whole[0].block_indices, parts[0].block_indices)
    torch.testing.assert_close(whole[0].out, parts[0].out, rtol=1e-12, atol=1e-12)
    for name, gradient in parts[1].items():
        torch.testing.assert_close(gradient, whole[1][name], rtol=1e-10, atol=1e-10)


def test_packing_is_invisible():
    inputs = random_inputs(PACKINGS["mixed"])
    grad_out = torch.randn(len(inputs.q), 4, 5, dtype=torch.float64)
    packed, packed_gradients = run(inputs, SMALL, "eager", grad_out)
    offsets = inputs.cu_seqlens.tolist()
    compared = 0
    for index, (start, end) in enumerate(itertools.pairwise(offsets)):
        if start == end:
            continue
        alone, gradients = run(one_document(inputs, index, SMALL), SMALL, "eager", grad_out[start:end])
        assert torch.equal(packed.block_indices[start:end], alone.block_indices)
        torch.testing.assert_close(packed.out[start:end], alone.out, rtol=1e-10, atol=1e-10)
        for name in ("q", "k", "v", "compress_k", "sliding_v", "gates"):
            torch.testing.assert_close(packed_gradients[name][start:end], gradients[name], rtol=1e-9, atol=1e-9)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_strays_no_further_than_rounding_its_inputs_and_outputs(dtype):
    exact = random_inputs(PACKINGS["mixed"])
    inputs = exact.to(dtype=dtype)
    truth_inputs = inputs.to(dtype=torch.float64)
    truth = native_sparse_attention(**truth_inputs._asdict(), config=SMALL, backend="reference")
    result = native_sparse_attention(
        **inputs._asdict(), config=SMALL, backend="eager", block_indices=truth.block_indices
    )
    assert result.out.dtype == dtype
    error = (result.out.double() - truth.out).norm() / truth.out.norm()
    assert error < 8 * torch.finfo(dtype).eps
    assert error > 0


def test_float32_chooses_the_blocks_of_float64_save_for_ties():
    inputs = random_inputs([150, 3, 61])
    truth = native_sparse_attention(**inputs._asdict(), config=SMALL, backend="reference")
    narrow = inputs.to(dtype=torch.float32)
    result = native_sparse_attention(**narrow._asdict(), config=SMALL, backend="eager")
    summary = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL, inputs.k_weights)
    summary = apply_rotary(summary, *inputs.compressed_rotary)
    _, lse = reference.compressed_attention(inputs.q, summary, summary, inputs.cu_seqlens, SMALL)
    importance = reference.block_importance(inputs.q, summary, lse, inputs.cu_seqlens, SMALL)
    differing = assert_same_blocks(result.block_indices, truth.block_indices, importance, tolerance=1e-5)
    assert differing <= 2


def test_ties_go_to_the_lower_index():
    inputs = random_inputs([200], kind="mean", rotary=False)
    inputs = inputs._replace(q=torch.zeros_like(inputs.q))
    expected = native_sparse_attention(**inputs._asdict(), config=SMALL, backend="reference").block_indices
    actual = native_sparse_attention(**inputs._asdict(), config=SMALL, backend="eager").block_indices
    assert (actual[-1] >= 0).all()
    last = actual[-1, 0].tolist()
    assert last == expected[-1, 0].tolist()
    assert last[:2] == [0, 1]


def test_memory_for_backward_holds_no_scores():
    inputs = random_inputs([512], num_heads=4, num_kv_heads=2, qk_dim=8, v_dim=8, kind="mean", dtype=torch.float32)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        native_sparse_attention(**inputs._asdict(), config=SMALL, backend="eager")
    tokens_by_heads_by_dim = 4 * 512 * 4 * 8
    assert 0 < sum(saved.values()) < 24 * tokens_by_heads_by_dim  # a T × T score matrix alone would be 64 of them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "backend must be one of auto, triton, eager, reference, got 'fast'"),
        ({"gates": torch.ones(9, 4, 2)}, r"gates must be \[T, H, 3\]"),
        ({"k": torch.ones(9, 3, 6)}, "must be a multiple of the KV heads, got 4 and 3"),
        ({"v": torch.ones(8, 2, 5)}, "v must be .* with k's T and H_kv"),
        ({"k": torch.ones(9, 2, 7)}, "k must be .* with q's T and D_qk"),
        ({"cu_seqlens": torch.tensor([0, 8])}, r"cu_seqlens must rise from 0 to 9 tokens, got \[0, 8\]"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "cu_seqlens must rise from 0 to 9 tokens"),
        ({"cu_seqlens": torch.tensor([0, 7, 5, 9])}, "cu_seqlens must rise from 0 to 9 tokens"),
        ({"cu_seqlens": torch.tensor([[0, 9]])}, r"cu_seqlens must be integers \[N \+ 1\]"),
        ({"block_indices": torch.zeros(9, 2, 1, dtype=torch.int32)}, r"block_indices must be \[T, H_kv, n\]"),
        ({"sliding_k": torch.ones(9, 2, 7)}, "sliding_k must have the shape of k"),
    ],
)
def test_shapes_that_disagree_are_named(change, message):
    inputs = random_inputs([9], dtype=torch.float32)._asdict() | change
    with pytest.raises(ValueError, match=message):
        native_sparse_attention(**inputs, config=SMALL)
