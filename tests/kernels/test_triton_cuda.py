"""The Triton backend on a GPU: right numbers in every dtype and shape, no wait for the device, bounded memory."""

import dataclasses
import functools
import itertools
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nsa_kernels import NSAConfig, native_sparse_attention
from nsa_kernels.packing import batch_layout, document_positions
from support.gpu import refusing_to_wait
from support.measured import Values, assert_strays_at_most_twice_as_far, attend, evaluate
from support.packings import Inputs, assert_same_blocks, cu_seqlens, random_inputs
from support.recorder import OperatorRecorder
from support.rows import dense_rows, importance_of_rows
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

kernels = pytest.importorskip("support.kernels", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]  # kernels are compiled for each shape

DEVICE = "cuda"
RAGGED = [1, 31, 700, 1, 2100, 64, 1300]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = [  # H, H_kv, D_qk, D_v
    (64, 4, 128, 128),
    (32, 8, 128, 128),
    (9, 3, 64, 64),
    (16, 2, 64, 128),
    (16, 1, 192, 128),
    (14, 2, 80, 80),
    (8, 8, 96, 96),
    (8, 2, 256, 256),
]
SELECTIONS = list(itertools.product([32, 64, 128], [4, 12, 16, 20]))  # l', n


def gpu_inputs(lengths: list[int], config: NSAConfig, shape: tuple[int, ...], dtype: torch.dtype, **options) -> Inputs:
    H, H_kv, D_qk, D_v = shape
    inputs = random_inputs(
        lengths, config, num_heads=H, num_kv_heads=H_kv, qk_dim=D_qk, v_dim=D_v, dtype=dtype, **options
    )
    return inputs.to(device=DEVICE)


def attention(inputs: Inputs, config: NSAConfig, **options) -> Values:
    return native_sparse_attention(**inputs._asdict(), config=config, backend="triton", **options)._asdict()


def compare(inputs: Inputs, config: NSAConfig, epsilon: float, wide: torch.dtype = torch.float32) -> set[str]:
    """The kernels and eager in `inputs`' dtype against eager in a wider one, all on the blocks the kernels chose."""
    actual = attend(inputs, config, "triton")
    blocks = actual["block_indices"]
    plain = attend(inputs, config, "eager", blocks)
    truth = attend(inputs.to(dtype=wide), config, "eager", blocks)
    assert all(value.isfinite().all() for value in actual.values())
    return assert_strays_at_most_twice_as_far(actual, plain, truth, epsilon)


def summaries(inputs: Inputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
    k, v, offsets = inputs.compress_k, inputs.compress_v, inputs.cu_seqlens
    k, v = (inputs.k if k is None else k), (inputs.v if v is None else v)
    return kernels.compress(k, offsets, config), kernels.compress(v, offsets, config)


def ranked_tokens(inputs: Inputs, config: NSAConfig) -> list[int]:
    """Tokens that see more blocks than they choose."""
    position = document_positions(inputs.cu_seqlens, len(inputs.q))
    return (position >= config.selected_tokens).nonzero().flatten().tolist()


def assert_right_blocks(inputs: Inputs, config: NSAConfig, tokens: list[int]) -> None:
    """The choice of the kernels at `tokens` is that of eager in float64 from the same summaries, save for ties."""
    q, offsets = inputs.q.detach(), inputs.cu_seqlens
    keys, values = (x.detach() for x in summaries(inputs, config))
    _, lse = kernels.compressed_attention(q, keys, values, offsets, config)
    actual = kernels.block_selection(q, keys, lse, offsets, config)[tokens].cpu()
    importance = importance_of_rows(q, keys, offsets, config, tokens)
    importance /= importance.amax(-1, keepdim=True).clamp(min=1e-30)
    position = document_positions(offsets, len(q))[tokens].cpu()
    expected = rank(importance, position // config.select_block_size, config)
    assert assert_same_blocks(actual, expected, importance, tolerance=1e-4) <= 1 + len(tokens) // 10
    assert (actual[..., 0] >= 0).all()


def rank(importance: Tensor, own: Tensor, config: NSAConfig) -> Tensor:
    """The n blocks of each row from importance [rows, H_kv, J], ascending then -1."""
    J, n = importance.shape[-1], config.num_selected_blocks
    j, own = torch.arange(J), own[:, None, None]
    score = importance.masked_fill((j < config.num_init_blocks) | (j > own - config.num_local_blocks), torch.inf)
    score = score.masked_fill(j > own, -1)
    best, chosen = torch.nn.functional.pad(score, (0, n), value=-1).sort(dim=-1, descending=True, stable=True)
    chosen = chosen[..., :n].masked_fill(best[..., :n] < 0, J).sort(-1).values
    return chosen.masked_fill(chosen == J, -1).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_right_for_every_shape_of_heads(shape, dtype):
    """Each with another size and number of blocks; the next test has all of those."""
    index = 2 * SHAPES.index(shape) + list(DTYPES).index(dtype)
    select, n = SELECTIONS[5 * index % len(SELECTIONS)]
    config = NSAConfig(select_block_size=select, num_selected_blocks=n)
    kind = ("mean", "linear", "mlp")[index % 3]
    inputs = gpu_inputs(RAGGED, config, shape, DTYPES[dtype], kind=kind, separate=index % 4 > 0)
    compared = compare(inputs, config, torch.finfo(DTYPES[dtype]).eps)
    assert len(compared) == len(inputs.leaves()) + 2


@pytest.mark.parametrize(("select", "n"), SELECTIONS)
def test_right_for_every_size_and_number_of_blocks(select, n):
    config = NSAConfig(select_block_size=select, num_selected_blocks=n)
    inputs = gpu_inputs(RAGGED, config, (12, 2, 64, 64), torch.bfloat16, kind="mean", rotary=False)
    compared = compare(inputs, config, torch.finfo(torch.bfloat16).eps)
    assert len(compared) == len(inputs.leaves()) + 2
    tokens = ranked_tokens(inputs, config)[::37]
    assert bool(tokens) == (config.selected_tokens < 2100)
    if tokens:
        assert_right_blocks(inputs, config, tokens)


@pytest.fixture
def matmul_precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("precision", "epsilon"), [("highest", 4e-6), ("high", 1e-3)])
def test_float32_is_as_precise_as_pytorch_is_told_to_be(matmul_precision, precision, epsilon):
    matmul_precision(precision)
    config = NSAConfig(select_block_size=32, num_selected_blocks=4)
    inputs = gpu_inputs([1, 31, 300, 64], config, (4, 2, 64, 64), torch.float32, kind="linear")
    compared = compare(inputs, config, epsilon, wide=torch.float64)
    assert len(compared) == len(inputs.leaves()) + 2


GEOMETRIES = [
    NSAConfig(num_selected_blocks=4),
    NSAConfig(compress_block_size=16, compress_stride=16, select_block_size=16, num_selected_blocks=3,
              num_local_blocks=1, window_size=1),
    NSAConfig(compress_block_size=24, compress_stride=8, select_block_size=32, num_selected_blocks=5,
              num_init_blocks=2, window_size=33),
    NSAConfig(compress_block_size=64, compress_stride=8, select_block_size=16, num_selected_blocks=7,
              num_init_blocks=0, num_local_blocks=1, window_size=100),
    NSAConfig(compress_block_size=32, compress_stride=8, select_block_size=64, num_selected_blocks=6),
]  # fmt: skip
KERNELS = [
    ((2, 2, 64, 64), GEOMETRIES[0], torch.bfloat16),
    ((4, 2, 64, 64), GEOMETRIES[1], torch.float16),
    ((6, 2, 80, 80), GEOMETRIES[2], torch.bfloat16),
    ((4, 1, 192, 128), GEOMETRIES[0], torch.bfloat16),
    ((7, 1, 64, 96), GEOMETRIES[3], torch.float16),
    ((8, 1, 96, 64), GEOMETRIES[4], torch.bfloat16),
    ((16, 1, 128, 128), GEOMETRIES[1], torch.bfloat16),
]
"""Seven sets of constants, for which the kernels are compiled; 30 packings each."""


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: "x".join(map(str, kernel[0])))
@given(
    lengths=st.lists(
        st.integers(0, 700) | st.sampled_from([0, 1, 15, 16, 17, 31, 32, 63, 64, 65, 128]), min_size=1, max_size=8
    ).filter(any),
    separate=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_right_for_any_packing(kernel, lengths, separate, seed):
    shape, config, dtype = kernel
    inputs = gpu_inputs(lengths, config, shape, dtype, kind="mean", separate=separate, seed=seed)
    assert {"out", "d v", "d gates"} <= compare(inputs, config, torch.finfo(dtype).eps)


def test_a_document_of_a_million_tokens_among_documents_of_one():
    config, lengths = NSAConfig(), [1, 1, 1_000_000, 1, 1]
    T, H, D = sum(lengths), 2, 64
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(T, heads, D, device=DEVICE, dtype=torch.bfloat16, generator=generator) for heads in (H, 1, 1)
    )
    gates = torch.rand(T, H, 3, device=DEVICE, generator=generator).bfloat16()
    inputs = Inputs(2 * q, k, v, gates, cu_seqlens(lengths)).to(device=DEVICE)
    result = attention(inputs, config)
    gradients = torch.autograd.grad(result["out"].square().sum(), list(inputs.leaves().values()))
    assert all(x.isfinite().all() and x.any() for x in (result["out"], *gradients))
    tokens = [0, 1, 2, 3, 2 + 30, 2 + 31, 2 + 1023, 2 + 1024, 2 + 524_287, T - 100_003, T - 3, T - 2, T - 1]
    keys, values = summaries(inputs, config)
    out = dense_rows(inputs, keys, values, result["block_indices"], config, tokens)
    error = (result["out"][tokens].double() - out).norm() / out.norm()
    assert error < torch.finfo(torch.bfloat16).eps
    assert_right_blocks(inputs, config, tokens)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SMALL_BATCH = ([1, 31, 700, 64, 290], NSAConfig(select_block_size=32, num_selected_blocks=8), (16, 2, 64, 64))


def small_batch(**options) -> tuple[Inputs, NSAConfig]:
    lengths, config, shape = SMALL_BATCH
    return gpu_inputs(lengths, config, shape, torch.bfloat16, **options), config


def test_two_runs_are_equal_under_deterministic_algorithms(deterministic):
    inputs, config = small_batch(kind="mean", rotary=False)
    first, second = (attend(inputs, config, "triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert first["d q"].any()


def test_no_wait_for_the_device_in_forward_and_backward():
    inputs, config = small_batch(kind="mlp")
    leaves, grad_out = list(inputs.leaves().values()), torch.randn_like(inputs.q)

    def step():
        return torch.autograd.grad(attention(inputs, config)["out"], leaves, grad_out)

    expected = step()  # compiles the kernels
    torch.cuda.synchronize()
    with refusing_to_wait():
        gradients = step()
    for gradient, before in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, before, rtol=2e-2, atol=2e-2)
        assert gradient.any()


def test_compiled_is_as_right_as_not_compiled():
    inputs, config = small_batch(kind="linear")
    plain = attend(inputs, config, "triton")
    blocks = plain["block_indices"]
    layout = batch_layout(inputs.cu_seqlens, len(inputs.q), config)
    torch.compiler.reset()
    compiled = torch.compile(functools.partial(attention, config=config, layout=layout), fullgraph=True)
    assert compiled(inputs)["block_indices"].shape == blocks.shape
    actual = evaluate(functools.partial(compiled, block_indices=blocks), inputs)
    truth = attend(inputs.to(dtype=torch.float32), config, "eager", blocks)
    compared = assert_strays_at_most_twice_as_far(actual, plain, truth, torch.finfo(torch.bfloat16).eps)
    assert len(compared) == len(inputs.leaves()) + 2


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_changes_nothing(deterministic, selective):
    inputs, config = small_batch(kind="mean", rotary=False)
    selection = torch.ops.nsa_kernels.block_selection.default
    options = {"context_fn": functools.partial(create_selective_checkpoint_contexts, [selection])} if selective else {}
    with OperatorRecorder() as recorder:
        actual = evaluate(lambda x: checkpoint(attention, x, config, use_reentrant=False, **options), inputs)
    expected = evaluate(lambda x: attention(x, config), inputs)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert expected["d q"].any()
    assert recorder.count(selection) == (1 if selective else 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["mean", "mlp"])
def test_autocast_changes_nothing_forward_or_backward(deterministic, kind, dtype):
    lengths, config, shape = SMALL_BATCH
    inputs = gpu_inputs(lengths, config, shape, dtype, kind=kind)
    for backend in ("triton", "eager"):
        expected = attend(inputs, config, backend)
        with torch.autocast(DEVICE, torch.float16 if dtype == torch.bfloat16 else torch.bfloat16):
            actual = attend(inputs, config, backend)
        for name, value in expected.items():
            assert actual[name].dtype == value.dtype, name
            assert torch.equal(actual[name], value), (backend, name)


@pytest.mark.parametrize(
    "change",
    [
        {"window_size": 2**31},
        {"window_size": sys.maxsize},
        {"select_block_size": 2**62},
        {"compress_block_size": 2**40},
        {"num_selected_blocks": 1000, "num_local_blocks": 900},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(16, 2, 64, 64), (16, 2, 128, 128), (6, 2, 80, 80)], ids=str)
def test_sizes_that_no_document_reaches_are_as_right_as_others(shape, change):
    lengths, config, _ = SMALL_BATCH
    config = dataclasses.replace(config, **change)
    inputs = gpu_inputs(lengths, config, shape, torch.bfloat16, kind="mean", rotary=False)
    assert {"out", "d q", "d v", "d gates"} <= compare(inputs, config, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["q", "k", "v", "compress_k", "compress_v", "sliding_k", "sliding_v"])
@pytest.mark.parametrize("shape", [(6, 2, 80, 80), (7, 1, 96, 96)], ids=str)
def test_infinity_and_nan_of_a_document_leave_the_others_as_they_are(deterministic, shape, name, value):
    """Head dims of 64 and 128 have kernels of their own on Hopper, which multiply whole tiles at the edges."""
    lengths, config, _ = SMALL_BATCH
    inputs = gpu_inputs(lengths, config, shape, torch.bfloat16, kind="mean", rotary=False)
    start, end = sum(lengths[:2]), sum(lengths[:3])
    bad = getattr(inputs, name).detach().clone()
    bad[start + 333] = value
    spoilt = inputs._replace(**{name: bad.requires_grad_()})

    def attended(x):
        out = attention(x, config)["out"]
        grad = torch.ones_like(out).where(out.isfinite(), float("nan"))
        leaves = x.leaves()
        return {"out": out} | dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))

    expected, actual = attended(inputs), attended(spoilt)
    for part, clean in expected.items():
        for rows in (slice(0, start), slice(end, None)):
            assert torch.equal(actual[part][rows], clean[rows]), part
    assert torch.equal(actual["out"][: start + 333], expected["out"][: start + 333])
    assert not actual["out"][start + 333 : end].isfinite().all()


@pytest.mark.parametrize("shape", [(16, 2, 64, 64), (16, 2, 128, 128), (6, 2, 80, 80)], ids=str)
def test_gradients_through_a_negative_gate_are_nan_and_never_wrong(shape):
    lengths, config, _ = SMALL_BATCH
    inputs = gpu_inputs(lengths, config, shape, torch.bfloat16, kind="mean", rotary=False)
    gates = inputs.gates.detach().clone()
    token = sum(lengths[:2]) + 5
    gates[token, :, 1] = -0.5
    actual = attend(inputs._replace(gates=gates.requires_grad_()), config, "triton")
    assert actual["out"].isfinite().all()
    assert actual["d q"][token].isnan().all()
    assert actual["d v"][token].isnan().all()
    assert actual["d q"][:token].isfinite().all()


def test_peak_memory_is_that_of_the_inputs_the_branches_and_the_gradients():
    """Three branches, their sum and dq, of q's size each; the other gradients; 512 MiB of lists and partial sums."""
    config, T, shape = NSAConfig(), 65536, (16, 2, 128, 128)
    H, H_kv, D, _ = shape
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, *pairs = (
        torch.randn(T, heads, D, device=DEVICE, dtype=torch.bfloat16, generator=generator).requires_grad_()
        for heads in (H, *6 * [H_kv])
    )
    gates = torch.rand(T, H, 3, device=DEVICE, generator=generator).bfloat16().requires_grad_()
    offsets, grad_out = cu_seqlens([T // 2, T // 4, T // 4]).to(DEVICE), torch.randn_like(q)
    inputs = Inputs(q, pairs[0], pairs[1], gates, offsets, *pairs[2:])

    def step():
        return torch.autograd.grad(attention(inputs, config)["out"], list(inputs.leaves().values()), grad_out)

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = step()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 5 * q.nbytes + sum(x.nbytes for x in pairs) + gates.nbytes + 2**29
    assert peak >= 5 * q.nbytes
    assert all(gradient.any() for gradient in gradients)
