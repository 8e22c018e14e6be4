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


class KeyRing(NamedTuple):
    """Keys and values on their way through shared memory, [STAGES, keys, D], and where both sides of it meet."""

    k: Any
    v: Any
    k_full: Any
    v_full: Any
    k_empty: Any
    v_empty: Any


class KeyBlock(NamedTuple):
    """Keys and values that stay in shared memory while queries pass, [keys, D]."""

    k: Any
    v: Any
    full: Any


class QueryRing(NamedTuple):
    """Tiles of ROWS rows on their way through shared memory, [STAGES, ROWS, ...], and where both sides of it meet."""

    q: Any
    do: Any
    lse: Any
    delta: Any
    token: Any
    full: Any
    empty: Any


class KeyTile(NamedTuple):
    """ROWS keys of a multiplying group, and the tokens from and up to which they are seen."""

    k: Any
    v: Any
    seen_from: Any
    seen_to: Any


class KeyGradients(NamedTuple):
    """Gradients of ROWS keys so far, and q · k of the next step."""

    products: Any
    dk: Any
    dv: Any


class Bounds(NamedTuple):
    """Tokens [lo, hi) that some rows of a tile see, and [inner_lo, inner_hi) that all of them do."""

    lo: Any
    inner_lo: Any
    inner_hi: Any
    hi: Any


class Steps(NamedTuple):
    """How a program walks its run: `edge_tiles` tiles of [lo, a) and [b, hi), then `inner_tiles` of [a, b), by head."""

    lo: Any
    a: Any
    b: Any
    edge_tiles: Any
    inner_tiles: Any
    num_edges: Any  # steps at the edges, of all heads
    total: Any  # one at least


class Step(NamedTuple):
    """Where a step is."""

    head: Any
    start: Any  # its first row


class TileRows(NamedTuple):
    """The rows of a tile."""

    token: Any
    row: Any  # int64, of [T, H]
    exists: Any


@gluon.jit
def load_bounds(first_ptr, end_ptr, first_token, last_token):
    """What tokens see whose runs ascend."""
    return Bounds(gl.load(first_ptr + first_token), gl.load(first_ptr + last_token),
                  gl.load(end_ptr + first_token), gl.load(end_ptr + last_token))  # fmt: skip


@gluon.jit
def cut(bounds, NUM_HEADS: gl.constexpr, TILE: gl.constexpr):
    """Cut the tokens within bounds into steps; no mask is needed at the inner ones."""
    lo = bounds.lo
    hi = gl.maximum(bounds.hi, lo)
    a = gl.minimum(lo + gl.cdiv(gl.maximum(bounds.inner_lo - lo, 0), TILE) * TILE, hi)
    inner_tiles = gl.maximum(bounds.inner_hi - a, 0) // TILE
    b = a + inner_tiles * TILE
    edge_tiles = gl.cdiv(a - lo, TILE) + gl.cdiv(hi - b, TILE)
    edge_tiles = gl.where(edge_tiles + inner_tiles == 0, 1, edge_tiles)
    return Steps(lo, a, b, edge_tiles, inner_tiles, edge_tiles * NUM_HEADS, (edge_tiles + inner_tiles) * NUM_HEADS)


@gluon.jit
def find_step(i, steps, TILE: gl.constexpr):
    """Where a step is. Inner tiles come last first, so that programs of one head read the same tiles."""
    is_edge = i < steps.num_edges
    tiles = gl.maximum(gl.where(is_edge, steps.edge_tiles, steps.inner_tiles), 1)
    within = gl.where(is_edge, i, i - steps.num_edges)
    edge = steps.lo + within % tiles * TILE
    edge = gl.where(edge < steps.a, edge, edge + steps.b - steps.a)
    return Step(within // tiles, gl.where(is_edge, edge, steps.a + (tiles - 1 - within % tiles) * TILE))


@gluon.jit
def barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """A ring of NUM barriers that open at COUNT arrivals."""
    ring = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(ring.index(i), count=COUNT)
    return ring


@gluon.jit
def dkv_memory(KEYS: gl.constexpr, READERS: gl.constexpr, DTYPE: gl.constexpr, HEADS: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """Shared memory for a block of KEYS keys, and for a ring of queries that READERS groups read."""
    D_QK: gl.constexpr = HEADS.D_QK
    D_V: gl.constexpr = HEADS.D_V
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_QK], DTYPE)
    do_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_V], DTYPE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k = gl.allocate_shared_memory(DTYPE, [KEYS, D_QK], gl.NVMMASharedLayout.get_default_for([KEYS, D_QK], DTYPE))
    v = gl.allocate_shared_memory(DTYPE, [KEYS, D_V], gl.NVMMASharedLayout.get_default_for([KEYS, D_V], DTYPE))
    q = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_QK], q_layout)
    do = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_V], do_layout)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat)
    token = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], flat)
    block = KeyBlock(k, v, barriers(1, 1))
    return block, QueryRing(q, do, lse, delta, token, barriers(STAGES, 2), barriers(STAGES, READERS))


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
def load_keys(i, start, kv_head, keys, ring, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Load the keys and the values of step i."""
    stage, phase = i % STAGES, i // STAGES & 1
    mbarrier.wait(ring.k_empty.index(stage), phase ^ 1)
    mbarrier.expect(ring.k_full.index(stage), keys.k.block_type.nbytes)
    tma.async_copy_global_to_shared(
        keys.k, [start, kv_head * HEADS.D_QK], ring.k_full.index(stage), ring.k.index(stage)
    )
    mbarrier.wait(ring.v_empty.index(stage), phase ^ 1)
    mbarrier.expect(ring.v_full.index(stage), keys.v.block_type.nbytes)
    tma.async_copy_global_to_shared(keys.v, [start, kv_head * HEADS.D_V], ring.v_full.index(stage), ring.v.index(stage))


@gluon.jit
def load_key_block(first_key, kv_head, keys, block, HEADS: gl.constexpr):
    """Load a block of keys and its values."""
    mbarrier.expect(block.full.index(0), keys.k.block_type.nbytes + keys.v.block_type.nbytes)
    tma.async_copy_global_to_shared(keys.k, [first_key, kv_head * HEADS.D_QK], block.full.index(0), block.k)
    tma.async_copy_global_to_shared(keys.v, [first_key, kv_head * HEADS.D_V], block.full.index(0), block.v)


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
    """The rows of a tile: ROWS / GROUP tokens, GROUP heads each; rows that do not exist repeat one that does."""
    r = gl.arange(0, ROWS, LAYOUT)
    token = first_token + r // GROUP
    exists = token < num_tokens
    token = gl.minimum(token, num_tokens - 1)
    return TileRows(token, token.to(gl.int64) * H + kv_head * GROUP + r % GROUP, exists)


@gluon.jit
def start_dkv(k, block, ring, HEADS: gl.constexpr):
    """q · k of the first step, and dk and dv of ROWS keys at zero."""
    D_QK: gl.constexpr = HEADS.D_QK
    D_V: gl.constexpr = HEADS.D_V
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    mbarrier.wait(block.full.index(0), 0)
    mbarrier.wait(ring.full.index(0), 0)
    products = warpgroup_mma(k, ring.q.index(0).permute((1, 0)), none, use_acc=False, is_async=True)
    dk = gl.zeros([ROWS, D_QK], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_QK, 16]))
    dv = gl.zeros([ROWS, D_V], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16]))
    return KeyGradients(warpgroup_mma_wait(0, deps=[products]), dk, dv)


@gluon.jit
def add_queries_to_dkv(
    grads, begin, stop, total, keys, ring, scale_log2,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) add to dk and dv; q · k of the next step runs beside ds · q of this one."""
    products, dk, dv = grads
    s_layout: gl.constexpr = products.type.layout
    column: gl.constexpr = gl.SliceLayout(0, s_layout)
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    for i in range(begin, stop):
        stage = i % STAGES
        dp = warpgroup_mma(keys.v, ring.do.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        lse = ring.lse.index(stage).load(column)
        p = gl.exp2(products * scale_log2 - lse[None, :])
        if MASKED:
            token = ring.token.index(stage).load(column)
            p = gl.where((token[None, :] >= keys.seen_from[:, None]) & (token[None, :] < keys.seen_to[:, None]), p, 0.0)
        delta = ring.delta.index(stage).load(column)
        rows = gl.convert_layout(p.to(keys.k.dtype), gl.DotOperandLayout(0, dv.type.layout, 2))
        dv = warpgroup_mma(rows, ring.do.index(stage), dv, is_async=True)
        ds = p * (warpgroup_mma_wait(1, deps=[dp]) - delta[None, :])
        rows = gl.convert_layout(ds.to(keys.k.dtype), gl.DotOperandLayout(0, dk.type.layout, 2))
        dk = warpgroup_mma(rows, ring.q.index(stage), dk, is_async=True)
        following = gl.minimum(i + 1, total - 1)
        mbarrier.wait(ring.full.index(following % STAGES), following // STAGES & 1)
        q = ring.q.index(following % STAGES).permute((1, 0))
        products = warpgroup_mma(keys.k, q, none, use_acc=False, is_async=True)
        dk, dv = warpgroup_mma_wait(1, deps=[dk, dv])
        mbarrier.arrive(ring.empty.index(stage), count=1)
        products = warpgroup_mma_wait(0, deps=[products])
    return KeyGradients(products, dk, dv)


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
