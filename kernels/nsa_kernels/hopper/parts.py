"""What the kernels written in Gluon for Hopper share.

Triton's own pipeline keeps Hopper's tensor cores half busy: all warps of a program compute their exponentials at the
same time. Here one warp does nothing but load tiles into shared memory, and groups of four warps multiply, each its own
ROWS rows and never waiting for another group: while one computes exponentials another has the tensor cores. Loading and
multiplying warps meet at barriers in shared memory, in rings: `full` when a tile has come, `empty` when it is used up.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# T packed tokens, H query heads, H_kv KV heads, D head dim.

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
HIDDEN = gl.constexpr(-1.0e37)
LOWEST = gl.constexpr(-1.0e30)
ROWS = gl.constexpr(64)
"""Rows of a multiplying group: what one instruction takes."""

thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # named anew in triton 3.7


class Steps(NamedTuple):
    """How a program walks its run: `edge_tiles` tiles of [lo, a) and [b, hi), then `inner_tiles` of [a, b), by head."""

    lo: Any
    a: Any
    b: Any
    edge_tiles: Any
    inner_tiles: Any
    num_edges: Any  # steps at the edges, of all heads
    total: Any  # one at least


@gluon.jit
def cut(lo, inner_lo, inner_hi, hi, HEADS: gl.constexpr, TILE: gl.constexpr):
    """Cut [lo, hi) into steps; no mask is needed within [inner_lo, inner_hi)."""
    hi = gl.maximum(hi, lo)
    a = gl.minimum(lo + gl.cdiv(gl.maximum(inner_lo - lo, 0), TILE) * TILE, hi)
    inner_tiles = gl.maximum(inner_hi - a, 0) // TILE
    b = a + inner_tiles * TILE
    edge_tiles = gl.cdiv(a - lo, TILE) + gl.cdiv(hi - b, TILE)
    edge_tiles = gl.where(edge_tiles + inner_tiles == 0, 1, edge_tiles)
    return Steps(lo, a, b, edge_tiles, inner_tiles, edge_tiles * HEADS, (edge_tiles + inner_tiles) * HEADS)


@gluon.jit
def load_bounds(first_ptr, end_ptr, first_token, last_token):
    """lo, inner_lo, inner_hi and hi, as `cut` takes them, of tokens whose runs ascend."""
    return (gl.load(first_ptr + first_token), gl.load(first_ptr + last_token),
            gl.load(end_ptr + first_token), gl.load(end_ptr + last_token))  # fmt: skip


@gluon.jit
def place_of(i, steps, TILE: gl.constexpr):
    """Head and first row of a step. Inner tiles come last first, so that programs of one head read the same tiles."""
    is_edge = i < steps.num_edges
    tiles = gl.maximum(gl.where(is_edge, steps.edge_tiles, steps.inner_tiles), 1)
    within = gl.where(is_edge, i, i - steps.num_edges)
    edge = steps.lo + within % tiles * TILE
    edge = gl.where(edge < steps.a, edge, edge + steps.b - steps.a)
    return within // tiles, gl.where(is_edge, edge, steps.a + (tiles - 1 - within % tiles) * TILE)


@gluon.jit
def barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """A ring of NUM barriers that open at COUNT arrivals."""
    ring = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(ring.index(i), count=COUNT)
    return ring


@gluon.jit
def ring(DTYPE: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for STAGES tiles of ROWS rows: q, do, lse, delta and the rows' tokens."""
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_QK], DTYPE)
    do_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_V], DTYPE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return (
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_QK], q_layout),
        gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_V], do_layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], flat),
    )


@gluon.jit
def softmax_step(products, row_max, row_sum, scale_log2):
    """p of one tile of keys, the new running maximum and sum, and what earlier sums shrink by."""
    new_max = gl.maximum(row_max, gl.max(products, 1) * scale_log2)
    p = gl.exp2(products * scale_log2 - new_max[:, None])
    shrink = gl.exp2(row_max - new_max)
    return p, new_max, row_sum * shrink + gl.sum(p, 1), shrink


@gluon.jit
def softmax_end(acc, row_max, row_sum):
    """o and natural-log lse of a finished running softmax; a row that saw no key has 0 and 0."""
    seen = row_sum > 0
    share = gl.convert_layout(1.0 / gl.where(seen, row_sum, 1.0), gl.SliceLayout(1, acc.type.layout))
    return acc * share[:, None], gl.where(seen, (row_max + gl.log2(row_sum)) * LN_2, 0.0)


@gluon.jit
def load_keys(
    i, start, k_desc, v_desc, kv_head, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
    D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and the values of step i."""
    stage, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(k_empty.index(stage), phase ^ 1)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [start, kv_head * D_QK], k_full.index(stage), k_smem.index(stage))
    mbarrier.wait(v_empty.index(stage), phase ^ 1)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(v_desc, [start, kv_head * D_V], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def load_tile(ptr, rows, D: gl.constexpr):
    """Rows [ROWS, D] of a contiguous [..., D] tensor by a group of four warps; `rows` int64, of `tile_rows`."""
    column = gl.arange(0, D, gl.SliceLayout(0, rows_layout(D)))
    return gl.load(ptr + rows[:, None] * D + column[None, :])


@gluon.constexpr_function
def rows_layout(D: int) -> gl.BlockedLayout:
    """How four warps hold rows of D elements that they load."""
    return gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])


@gluon.jit
def tile_rows(first_token, num_tokens, kv_head, H: gl.constexpr, GROUP: gl.constexpr, LAYOUT: gl.constexpr):
    """Token, [T, H] row (int64) and existence of each row of a tile: ROWS / GROUP tokens, GROUP heads each."""
    r = gl.arange(0, ROWS, LAYOUT)
    token = first_token + r // GROUP
    exists = token < num_tokens
    token = gl.minimum(token, num_tokens - 1)
    return token, token.to(gl.int64) * H + kv_head * GROUP + r % GROUP, exists


@gluon.jit
def start_dkv(k, shared, D_QK: gl.constexpr, D_V: gl.constexpr):
    """q · k of the first step, and dk and dv of ROWS keys at zero."""
    q_smem, kv_full, full = shared[2], shared[7], shared[8]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    mbarrier.wait(kv_full.index(0), 0)
    mbarrier.wait(full.index(0), 0)
    products = warpgroup_mma(k, q_smem.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    dk = gl.zeros([ROWS, D_QK], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_QK, 16]))
    dv = gl.zeros([ROWS, D_V], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16]))
    return warpgroup_mma_wait(0, deps=[products]), dk, dv


@gluon.jit
def add_queries_to_dkv(
    state, begin, stop, total, k, v, shared, seen_from, seen_to, scale_log2,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) add to dk and dv; q · k of the next step runs beside ds · q of this one."""
    products, dk, dv = state
    _, _, q_smem, do_smem, lse_smem, delta_smem, token_smem, _, full, empty = shared
    s_layout: gl.constexpr = products.type.layout
    column: gl.constexpr = gl.SliceLayout(0, s_layout)
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    for i in range(begin, stop):
        stage = i % STAGES
        dp = warpgroup_mma(v, do_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        lse = lse_smem.index(stage).load(column)
        p = gl.exp2(products * scale_log2 - lse[None, :])
        if MASKED:
            token = token_smem.index(stage).load(column)
            p = gl.where((token[None, :] >= seen_from[:, None]) & (token[None, :] < seen_to[:, None]), p, 0.0)
        delta = delta_smem.index(stage).load(column)
        rows = gl.convert_layout(p.to(k.dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
        dv = warpgroup_mma(rows, do_smem.index(stage), dv, is_async=True)
        ds = p * (warpgroup_mma_wait(1, deps=[dp]) - delta[None, :])
        rows = gl.convert_layout(ds.to(k.dtype), gl.DotOperandLayout(0, dk.type.layout, 2))
        dk = warpgroup_mma(rows, q_smem.index(stage), dk, is_async=True)
        following = gl.minimum(i + 1, total - 1)
        mbarrier.wait(full.index(following % STAGES), following // STAGES & 1)
        q = q_smem.index(following % STAGES).permute((1, 0))
        products = warpgroup_mma(k, q, none, use_acc=False, is_async=True)
        dk, dv = warpgroup_mma_wait(1, deps=[dk, dv])
        mbarrier.arrive(empty.index(stage), count=1)
        products = warpgroup_mma_wait(0, deps=[products])
    return products, dk, dv


@gluon.jit
def store_keys(ptr, value, first_row, row_step, num_keys, D: gl.constexpr):
    """Write the first `num_keys` rows of `value` to rows first_row, first_row + row_step, ... of a [..., D] tensor."""
    key = gl.arange(0, ROWS, gl.SliceLayout(1, value.type.layout))
    column = gl.arange(0, D, gl.SliceLayout(0, value.type.layout))
    addresses = ptr + (first_row + key * row_step)[:, None] * D + column[None, :]
    gl.store(addresses, value.to(ptr.dtype.element_ty), mask=(key < num_keys)[:, None])


def resident_programs(items: int, device: torch.device) -> int:
    """Programs that attend one item after another: as many as the device runs at a time, or one for each item."""
    return min(torch.cuda.get_device_properties(device).multi_processor_count, items)


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Copies tiles of `rows` rows of one head of a contiguous x [rows, heads, D] to and from shared memory."""
    if x.data_ptr() % 16:  # as the copy engine wants it
        x = x.clone()
    return TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [rows, x.shape[-1]], tile_layout(x, rows))


def tile_layout(x: Tensor, rows: int) -> gl.NVMMASharedLayout:
    """How a tile of `rows` rows of x [..., D] lies in shared memory for the tensor cores."""
    return _layout(rows, x.shape[-1], x.dtype)


@cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _ELEMENTS[dtype])


_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
