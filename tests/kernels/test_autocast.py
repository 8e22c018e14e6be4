"""Autocast changes no arithmetic of the operator: forward, backward and decoding, in every backend."""

import pytest
import torch
from nsa_kernels import NSAConfig, native_sparse_attention
from nsa_kernels.decode.attention import LayerCache, chunk_attention, decode_attention, decode_dense_attention
from nsa_kernels.decode.eager import started_blocks
from nsa_kernels.eager.compress import summarise
from support.packings import Inputs, random_inputs

CONFIG = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=4, num_selected_blocks=3, window_size=5)
BACKENDS = ["reference", "eager", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def skip_where_impossible(backend, dtype=torch.float32):
    if backend == "triton" and (torch.cuda.is_available() or dtype != torch.float32):
        pytest.skip("Triton's interpreter is for machines without a GPU, and knows float32 and float16")


def small(kind, dtype=torch.float32) -> Inputs:
    return random_inputs([3, 15], CONFIG, num_heads=2, num_kv_heads=1, qk_dim=8, v_dim=4, kind=kind, dtype=dtype)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def attended(inputs, backend, forward=False, backward=False):
    """Output and gradients by name, each pass within autocast or not."""
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        out = native_sparse_attention(**inputs._asdict(), config=CONFIG, backend=backend).out
    leaves = inputs.leaves()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {"out": out.detach()} | dict(zip(leaves, gradients, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_every_gradient_are_the_same_bit_by_bit(backend, dtype, kind):
    skip_where_impossible(backend, dtype)
    inputs = small(kind, dtype)
    expected = attended(inputs, backend)
    for forward, backward in ((True, False), (True, True), (False, True)):
        actual = attended(inputs, backend, forward, backward)
        for name, value in expected.items():
            assert actual[name].dtype == value.dtype
            assert torch.equal(actual[name], value), name
    assert all(value.any() for value in expected.values())


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gates_and_weights_may_be_wider_than_what_autocast_made_of_the_projections(backend):
    """As a layer gives them: bf16 projections, float32 parameters of the summaries."""
    inputs = small("mlp")
    inputs = inputs._replace(
        **{
            name: getattr(inputs, name).detach().bfloat16().requires_grad_()
            for name in ("q", "k", "v", "sliding_k", "sliding_v", "compress_k", "compress_v")
        }
    )
    expected, actual = attended(inputs, backend), attended(inputs, backend, forward=True, backward=True)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert expected["out"].dtype == torch.bfloat16
    assert expected["k_weights.in_weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_decoding_is_the_same_bit_by_bit(backend):
    skip_where_impossible(backend)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    q, gates = random(2, 4, 8), random(2, 4, 3).sigmoid()
    cache = LayerCache(*(random(2, size, 2, 8) for size in (16, 16, 5, 5, 8, 8)))
    positions = torch.tensor([15, 6]).int()
    chunk = [random(size, 2, 8) for size in (16, 16, 16, 16, 8, 8)]

    def run():
        yield decode_attention(q, gates, cache, positions, CONFIG, backend=backend).out
        yield decode_dense_attention(q, cache.k, cache.v, positions, backend=backend)
        yield chunk_attention(random_q, gates_of_chunk, *chunk, CONFIG, backend=backend).out

    random_q, gates_of_chunk = random(5, 4, 8), random(5, 4, 3).sigmoid()
    expected = list(run())
    with autocast():
        actual = list(run())
    assert all(torch.equal(*pair) and pair[0].dtype == torch.float32 for pair in zip(actual, expected, strict=True))


def test_summaries_on_the_way_into_a_cache_are_the_same_bit_by_bit():
    inputs = small("mlp")
    weights = inputs.k_weights, inputs.v_weights
    ring = tuple(x.detach()[None, :4] for x in (inputs.compress_k, inputs.compress_v))

    def run():
        with torch.no_grad():
            yield summarise(ring[0], weights[0])
            yield from started_blocks(ring, torch.tensor([3]), CONFIG, weights)

    expected = list(run())
    with autocast():
        actual = list(run())
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert len(expected) == 5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
def test_compiled_within_autocast_it_is_the_same_forward_and_backward():
    """The compiler traces a backward in the autocast of its forward."""
    pytest.importorskip("triton")
    inputs = small("mlp")

    def function(x):
        with autocast():
            return native_sparse_attention(**x._asdict(), config=CONFIG, backend="triton").out

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = attended(inputs, "triton")
    leaves = inputs.leaves()
    out = compiled(inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    actual = {"out": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True)
    )
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
