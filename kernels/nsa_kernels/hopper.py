"""What the kernels written in Gluon for Hopper share.

Triton's own pipeline keeps Hopper's tensor cores half busy: all warps of a program compute their exponentials at the
same time. Here one warp does nothing but load tiles into shared memory, and groups of four warps multiply, each its own
ROWS rows and never waiting for another group: while one computes exponentials another has the tensor cores. Loading and
multiplying warps meet at barriers in shared memory, in rings: `full` when a tile has come, `empty` when it is used up.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# T packed tokens, H query heads, H_kv KV heads, D head dim.

LOG2_E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
HIDDEN = gl.constexpr(-1.0e37)
LOWEST = gl.constexpr(-1.0e30)
ROWS = gl.constexpr(64)
"""Rows of a multiplying group: what one instruction takes."""

thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # named anew in triton 3.7


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


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Copies tiles of `rows` rows of one head of a contiguous x [rows, heads, D] to and from shared memory."""
    if x.data_ptr() % 16:  # as the copy engine wants it
        x = x.clone()
    return TensorDescriptor.from_tensor(x.view(x.shape[0], -1), [rows, x.shape[-1]], tile_layout(x, rows))


def tile_layout(x: Tensor, rows: int) -> gl.NVMMASharedLayout:
    """How a tile of `rows` rows of x [..., D] lies in shared memory for the tensor cores."""
    return gl.NVMMASharedLayout.get_default_for([rows, x.shape[-1]], _ELEMENTS[x.dtype])


_ELEMENTS = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
