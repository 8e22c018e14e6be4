"""Attention to a cache on a GPU: right numbers in every dtype and shape, the same from a CUDA graph, no wait."""

import pytest
import torch
from nsa_kernels import NSAConfig
from nsa_kernels.decode.attention import (
    LayerCache,
    NewTokens,
    append_tokens,
    chunk_attention,
    decode_attention,
    decode_dense_attention,
)
from nsa_kernels.rotary import apply_rotary
from support.gpu import DTYPES, epsilon, refusing_to_wait
from support.measured import assert_strays_at_most_twice_as_far
from support.packings import assert_same_blocks, cu_seqlens
from support.rows import importance_of_rows
from torch import Tensor

from nsa_lightning.generation.cuda_graphs import capture

pytest.importorskip("nsa_kernels.decode.step", exc_type=ImportError)
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]  # kernels are compiled for each shape

SHAPES = {  # H, H_kv, D_qk, D_v
    "A": (64, 4, 128, 128),
    "B": (32, 8, 128, 128),
    "smollm": (9, 3, 64, 64),
    "paper": (64, 4, 192, 128),
    "narrow": (14, 2, 80, 80),
    "wide": (8, 2, 256, 256),
}
CONFIG = NSAConfig()
EDGES = [0, 14, 15, 30, 31, 32, 47, 63, 64, 511, 512, 1023, 1024, 1025, 2047, 3000]
"""Positions around every size of CONFIG: the first summary is complete at 31, the choice begins at 1024."""
BATCHES = {1: [1024], 3: [0, 31, 70_000], 64: 4 * EDGES}


def normal(*size: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(size, device="cuda", dtype=dtype, generator=generator)


class Step:
    """One new token of each sequence: queries, gates, and a cache in which every slot holds something."""

    def __init__(self, shape: str, positions: list[int], dtype: torch.dtype) -> None:
        H, H_KV, D_QK, D_V = SHAPES[shape]
        B, slots = len(positions), (max(positions) // CONFIG.select_block_size + 1) * CONFIG.select_block_size
        sizes = [slots, slots, CONFIG.window_size, CONFIG.window_size, *2 * [slots // CONFIG.compress_stride]]
        self.cache = LayerCache(
            *(normal(B, size, H_KV, (D_QK, D_V)[i % 2], dtype=dtype, seed=i) for i, size in enumerate(sizes))
        )
        self.q = normal(B, H, D_QK, dtype=dtype, seed=6)
        self.gates = normal(B, H, 3, dtype=dtype, seed=7).sigmoid()
        self.positions = torch.tensor(positions, device="cuda", dtype=torch.int32)

    def attend(self, backend: str = "triton", dtype: torch.dtype | None = None, sequence: slice = slice(None)):
        """`decode_attention` of some sequences, its inputs cast."""
        cache = LayerCache(*(x[sequence].to(dtype) for x in self.cache))
        q, gates = self.q[sequence].to(dtype), self.gates[sequence].to(dtype)
        return decode_attention(q, gates, cache, self.positions[sequence], CONFIG, backend=backend)

    def attend_densely(
        self, window: int | None, backend: str = "triton", dtype: torch.dtype | None = None, sequence=slice(None)
    ) -> Tensor:
        """`decode_dense_attention` of some sequences to all their tokens, or to the ring."""
        k, v = (x[sequence].to(dtype) for x in (self.cache[:2] if window is None else self.cache[2:4]))
        return decode_dense_attention(
            self.q[sequence].to(dtype), k, v, self.positions[sequence], window, backend=backend
        )

    def shared(self) -> "Step":
        """The same with the sliding branch on the keys of the selected one."""
        self.cache = self.cache._replace(sliding_k=self.cache.k, sliding_v=self.cache.v)
        return self


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else torch.float32


def assert_as_right_as_eager(actual, plain, truth, importance_of, dtype: torch.dtype) -> None:
    """Outputs are compared where all choose alike; other choices must be ties.

    Args:
        actual: NSAOutput of the kernels, rows of queries.
        plain: that of eager in the same dtype.
        truth: that of eager in a wider one.
        importance_of: importance of the blocks of one row, [1, H_kv, J].
        dtype: of the inputs.
    """
    alike = torch.ones(truth.block_indices.shape[:2], dtype=torch.bool, device="cuda")  # [rows, H_kv]
    for result in (actual, plain):
        alike &= (result.block_indices == truth.block_indices).all(-1)
    differing = (actual.block_indices != truth.block_indices).flatten(1).any(1).nonzero().flatten().tolist()
    for row in differing[:20]:
        importance = importance_of(row)
        importance /= importance.amax(-1, keepdim=True)
        blocks = (x.block_indices[row : row + 1].cpu() for x in (actual, truth))
        assert_same_blocks(*blocks, importance, tolerance=1e-4)
    assert alike.float().mean() > 0.9
    assert_outputs_stray_little(
        *(x.out.unflatten(1, (alike.shape[1], -1))[alike] for x in (actual, plain, truth)), dtype
    )


def assert_outputs_stray_little(actual: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Every head is divided by its size: the more keys a query sees, the smaller its output is."""
    size = torch.linalg.vector_norm(truth.double(), dim=-1, keepdim=True) / truth.shape[-1] ** 0.5
    named = ({"out": x / size} for x in (actual, plain, truth))
    assert assert_strays_at_most_twice_as_far(*named, epsilon(dtype)) == {"out"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_of_each_sequence_is_as_right_as_eager(shape, dtype):
    for positions in BATCHES.values():
        step = Step(shape, positions, DTYPES[dtype])

        def importance_of(row, step=step):
            length = int(step.positions[row]) + 1
            q, offsets = step.q[row].expand(length, -1, -1), cu_seqlens([length]).cuda()
            return importance_of_rows(q, step.cache.summary_k[row], offsets, CONFIG, [length - 1])

        for case in (step, step.shared()):
            results = case.attend(), case.attend("eager"), case.attend("eager", wider(DTYPES[dtype]))
            assert_as_right_as_eager(*results, importance_of, DTYPES[dtype])


@pytest.mark.parametrize("window", [None, CONFIG.window_size])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_attention_of_a_token_is_as_right_as_eager(shape, dtype, window):
    for positions in BATCHES.values():
        step, wide = Step(shape, positions, DTYPES[dtype]), wider(DTYPES[dtype])
        results = (step.attend_densely(window, *how) for how in ((), ("eager",), ("eager", wide)))
        assert_outputs_stray_little(*results, DTYPES[dtype])


def new_tokens(step: Step) -> list[NewTokens]:
    """A token for the selected branch and one for the ring, the second not rotated."""
    k, v = (normal(len(x), *x.shape[2:], dtype=x.dtype, seed=8) for x in step.cache[:2])
    return [NewTokens(k, v, *step.cache[:2], True), NewTokens(k, v, *step.cache[2:4], False)]


def rotary_of(step: Step) -> tuple[Tensor, Tensor]:
    rotated = step.q.shape[-1] // 4  # half of the dimensions, as pairs
    angles = step.positions[:, None] * 10.0 ** -torch.arange(rotated, device="cuda")
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_new_token_is_rotated_into_its_slot_and_nothing_else_changes(shape, dtype):
    for positions in BATCHES.values():
        step = Step(shape, positions, DTYPES[dtype])
        tokens, rotary = new_tokens(step), rotary_of(step)
        expected = [x.clone() for x in step.cache[:4]]
        rows, place = torch.arange(len(positions), device="cuda"), step.positions.long()
        for new, k, v in zip(tokens, expected[::2], expected[1::2], strict=True):
            k[rows, place % k.shape[1]] = apply_rotary(new.k, *rotary) if new.rotate else new.k
            v[rows, place % v.shape[1]] = new.v
        q = append_tokens(step.q, tokens, step.positions, rotary, backend="triton")
        tolerance = epsilon(DTYPES[dtype])
        for actual, right in zip((q, *step.cache[:4]), (apply_rotary(step.q, *rotary), *expected), strict=True):
            torch.testing.assert_close(actual, right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((shape, "bfloat16") for shape in SHAPES), ("A", "float16"), ("smollm", "float32")]
)
def test_a_chunk_is_as_right_as_eager(shape, dtype):
    H, H_KV, D_QK, D_V = SHAPES[shape]
    kind, L = DTYPES[dtype], 3000
    keys = [normal(L, H_KV, (D_QK, D_V)[i % 2], dtype=kind, seed=i) for i in range(4)]
    summaries = [normal(L // CONFIG.compress_stride, H_KV, D, dtype=kind, seed=4) for D in (D_QK, D_V)]
    q, gates = normal(L, H, D_QK, dtype=kind, seed=6), normal(L, H, 3, dtype=kind, seed=7).sigmoid()
    for start, stop in ((0, 1), (0, 20), (20, 800), (1023, 1030), (800, L)):
        recent = max(0, start - CONFIG.window_size + 1)
        parts = q[start:stop], gates[start:stop], *(x[:stop] for x in keys[:2]), *(x[recent:stop] for x in keys[2:])

        def attend(backend, dtype, inputs=(*parts, *summaries)):
            return chunk_attention(*(x.to(dtype) for x in inputs), CONFIG, backend=backend)

        def importance_of(row, start=start):
            length = start + row + 1
            return importance_of_rows(q[:length], summaries[0], cu_seqlens([length]).cuda(), CONFIG, [length - 1])

        results = attend("triton", kind), attend("eager", kind), attend("eager", wider(kind))
        assert_as_right_as_eager(*results, importance_of, kind)


def whole_step(step: Step):
    """What computes everything of a step, its own keys and values written first; waits for nothing itself."""
    tokens, rotary = new_tokens(step), rotary_of(step)

    def run() -> list[Tensor]:
        q = append_tokens(step.q, tokens, step.positions, rotary, backend="triton")
        return [q, *step.attend(), step.attend_densely(None), step.attend_densely(CONFIG.window_size)]

    return run


@pytest.mark.parametrize("shape", ["A", "B", "smollm"])
def test_a_graph_captured_at_one_set_of_positions_computes_any_other(shape):
    step, outs = Step(shape, [3000, 31, 0, 1024], torch.bfloat16), []
    run = whole_step(step)
    captured = capture(run)
    for positions in ([0, 0, 0, 0], [1023, 2999, 30, 512], [3007, 1, 2048, 64]):
        step.positions.copy_(torch.tensor(positions))
        replayed = [x.clone() for x in captured.replay()]
        for actual, expected in zip(replayed, run(), strict=True):
            assert torch.equal(actual, expected)
        outs.append(replayed[1])
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("shape", ["A", "smollm"])
def test_logits_of_gates_inside_a_wider_tensor_weigh_by_their_sigmoid(shape):
    step = Step(shape, [1023, 31, 0, 700], torch.bfloat16)  # so near that no block is left out
    H, joint = step.q.shape[1], normal(4, 5216, dtype=torch.bfloat16, seed=8)
    logits = joint[:, -3 * H :].unflatten(1, (H, 3))
    actual = decode_attention(step.q, logits, step.cache, step.positions, CONFIG, gate_logits=True).out
    q, gates, exact = step.q.float(), logits.float().sigmoid(), LayerCache(*(x.float() for x in step.cache))
    expected = decode_attention(q, gates, exact, step.positions, CONFIG, backend="eager").out
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)


def test_layers_that_follow_each_other_in_a_graph_keep_their_memory_apart():
    """A launch may begin before the one in front of it ends; what one call leaves the next one writes over."""
    steps = [Step(shape, [3000, 31, 0, 1024], torch.bfloat16) for shape in ("A", "B")]
    alone = []
    for step in steps:
        alone.append(step.attend())
        torch.cuda.synchronize()
    layers = 8 * steps
    captured = capture(lambda: [step.attend() for step in layers])
    for _ in range(50):
        for i, result in enumerate(captured.replay()):
            assert torch.equal(result.out, alone[i % 2].out)
            assert torch.equal(result.block_indices, alone[i % 2].block_indices)
    assert all(result.out.any() for result in alone)


def test_two_runs_are_equal_and_wait_for_nothing():
    run = whole_step(Step("A", 4 * EDGES, torch.bfloat16))
    first = run()  # compiles the kernels
    torch.cuda.synchronize()
    with refusing_to_wait():
        second = run()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
        assert other.any()


def test_offsets_past_the_reach_of_32_bits():
    """The last of eight sequences of 300,000 tokens begins past 2 ** 31 elements."""
    step = Step("B", [5, *7 * [299_999]], torch.bfloat16)
    last = slice(-1, None)
    assert step.cache.k[:-1].numel() > 2**31
    new = new_tokens(step)[0]
    append_tokens(step.q, [new], step.positions, rotary_of(step), backend="triton")
    assert torch.equal(step.cache.v[-1, 299_999], new.v[-1])
    actual, truth = step.attend(), step.attend("eager", torch.float32, last)
    alike = (actual.block_indices[last] == truth.block_indices).all(-1)
    assert alike.float().mean() >= 0.5
    pairs = (x.unflatten(1, (8, -1))[alike].double() for x in (actual.out[last], truth.out))
    dense = step.attend_densely(None)[last].double(), step.attend_densely(None, "eager", torch.float32, last).double()
    for out, right in (pairs, dense):
        assert (out - right).norm() / right.norm() < torch.finfo(torch.bfloat16).eps
