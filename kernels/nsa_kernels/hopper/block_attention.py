"""Attention to chosen blocks, written in Gluon for Hopper: see `triton/block_attention.py`.

A tile has two or three parts of ROWS rows, a multiplying group each. They share one ring of keys and values:
what several chose is read from the L2 cache once, and a part passes over the blocks that none of its queries chose.

Also how a tile walks the union of its blocks, for `query_gradient.py`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.hopper.parts import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    ROWS,
    barriers,
    load_keys,
    load_tile,
    resident_programs,
    rows_layout,
    softmax_end,
    thread_barrier,
    tile_rows,
    tiles,
)
from nsa_kernels.triton.arguments import Keys, heads_of
from nsa_kernels.triton.block_lists import MAX_TILE_QUERIES, Union, UnionTable, unite

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, B blocks, I items of the list.


class Memory(NamedTuple):
    """Shared memory of a program, and where its warps meet."""

    q: Any  # [PARTS, ROWS, D_QK]
    k: Any  # [STAGES, ROWS, D_QK]
    v: Any  # [STAGES, ROWS, D_V]
    full: Any
    empty: Any


class Tensors(NamedTuple):
    """What a multiplying group reads and writes by itself."""

    q: Any  # [T, H, D_QK]
    o: Any  # [T, H, D_V]
    lse: Any  # [T, H]


class Extent(NamedTuple):
    """How many queries there are, and how many keys come before the first."""

    num_tokens: Any
    num_tiles: Any
    past: Any


class UnionStep(NamedTuple):
    """ROWS keys of a block, and who chose it."""

    start: Any
    chosen: Any


@gluon.jit
def load_union(first_step, union, kv_head, keys, ring, HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    """Load the keys and values of a tile's union, ROWS of them in a step."""
    for run in range(union.size * (BLOCK_SIZE // ROWS)):
        start = gl.load(union.start + run // (BLOCK_SIZE // ROWS)) + run % (BLOCK_SIZE // ROWS) * ROWS
        load_keys(first_step + run, start, kv_head, keys, ring, HEADS, STAGES)


@gluon.jit
def union_step(union, run, runs, BLOCK_SIZE: gl.constexpr):
    """A step of a union; nobody chose those past the end."""
    block = gl.minimum(run, runs - 1) // (BLOCK_SIZE // ROWS)
    start = gl.load(union.start + block) + run % (BLOCK_SIZE // ROWS) * ROWS
    return UnionStep(start, gl.load(union.mask + block))


@gluon.jit
def union_of(tile, kv_head, num_tiles, table, H_KV: gl.constexpr):
    """The union of a tile; empty past the last tile."""
    row = gl.minimum(tile, num_tiles - 1).to(gl.int64) * H_KV + kv_head
    size = gl.where(tile < num_tiles, gl.load(table.size + row), 0)
    return Union(table.start + row * table.slots, table.mask + row * table.slots, size)


@gluon.jit
def _load_forward(keys, table, memory, num_tiles, HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: the keys and values of the unions of all tiles of the program, ROWS of them in a step."""
    D_QK: gl.constexpr = HEADS.D_QK
    D_V: gl.constexpr = HEADS.D_V
    step = 0
    for item in range(gl.program_id(0), num_tiles * HEADS.H_KV, gl.num_programs(0)):
        tile, kv_head = item % num_tiles, item // num_tiles
        union = union_of(tile, kv_head, num_tiles, table, HEADS.H_KV)
        runs = union.size * (BLOCK_SIZE // ROWS)
        start = union_step(union, 0, gl.maximum(runs, 1), BLOCK_SIZE).start
        for run in range(runs):
            stage, phase = step % STAGES, step // STAGES & 1
            next_start = union_step(union, run + 1, runs, BLOCK_SIZE).start
            mbarrier.wait(memory.empty.index(stage), phase ^ 1)
            full = memory.full.index(stage)
            mbarrier.expect(full, keys.k.block_type.nbytes + keys.v.block_type.nbytes)
            tma.async_copy_global_to_shared(keys.k, [start, kv_head * D_QK], full, memory.k.index(stage))
            tma.async_copy_global_to_shared(keys.v, [start, kv_head * D_V], full, memory.v.index(stage))
            start = next_start
            step += 1


@gluon.jit
def _load_own_queries(q_ptr, q, first_token, num_tokens, kv_head, HEADS: gl.constexpr):
    """Bring the queries of a part to shared memory."""
    layout: gl.constexpr = gl.SliceLayout(1, rows_layout(HEADS.D_QK))
    rows = tile_rows(first_token, num_tokens, kv_head, HEADS.H, HEADS.GROUP, layout).row
    q.store(load_tile(q_ptr, rows, HEADS.D_QK))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _multiply_forward(
    tensors, table, memory, extent, scale_log2,
    PART: gl.constexpr, PARTS: gl.constexpr, HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: one part of each tile, and of the tile's union the blocks that its queries chose.

    Rows that did not choose a block are hidden as in Triton's `block_attention.py`.
    """
    GROUP: gl.constexpr = HEADS.GROUP
    D_V: gl.constexpr = HEADS.D_V
    QUERIES: gl.constexpr = ROWS // GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    num_tokens, num_tiles, past = extent
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    q = memory.q.index(PART)
    step = 0
    for item in range(gl.program_id(0), num_tiles * HEADS.H_KV, gl.num_programs(0)):
        tile, kv_head = item % num_tiles, item // num_tiles
        union = union_of(tile, kv_head, num_tiles, table, HEADS.H_KV)
        first_token = (tile * PARTS + PART) * QUERIES
        _load_own_queries(tensors.q, q, first_token, num_tokens, kv_head, HEADS)
        token, rows, exists = tile_rows(first_token, num_tokens, kv_head, HEADS.H, GROUP, row)
        query = gl.arange(0, ROWS, row) // GROUP
        row_max, row_sum = gl.full([ROWS], LOWEST, gl.float32, row), gl.zeros([ROWS], gl.float32, row)
        acc = gl.zeros([ROWS, D_V], gl.float32, o_layout)
        runs = union.size * (BLOCK_SIZE // ROWS)
        start, chosen = union_step(union, 0, gl.maximum(runs, 1), BLOCK_SIZE)
        for run in range(runs):
            stage = step % STAGES
            next_start, next_chosen = union_step(union, run + 1, runs, BLOCK_SIZE)
            chosen = chosen >> (PART * QUERIES)
            mbarrier.wait(memory.full.index(stage), step // STAGES & 1)
            if (chosen & ((1 << QUERIES) - 1)) != 0:
                k, v = memory.k.index(stage).permute((1, 0)), memory.v.index(stage)
                products = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
                chose = (chosen >> query) & 1 != 0
                products = warpgroup_mma_wait(0, deps=[products])
                if start + ROWS > past + first_token + 1:  # only then has it keys after one of the queries
                    s = start + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
                    products = gl.where(s[None, :] <= (past + token)[:, None], products, HIDDEN)
                new_max = gl.where(chose, gl.maximum(row_max, gl.max(products, 1) * scale_log2), row_max)
                p = gl.exp2(products * scale_log2 - gl.where(chose, new_max, -LOWEST)[:, None])
                shrink = gl.exp2(row_max - new_max)
                row_max, row_sum = new_max, row_sum * shrink + gl.sum(p, 1)
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, o_layout))[:, None]
                p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, o_layout, 2))
                acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v, acc, is_async=True)])
            mbarrier.arrive(memory.empty.index(stage), count=1)
            start, chosen = next_start, next_chosen
            step += 1
        o, lse = softmax_end(acc, row_max, row_sum)
        gl.store(tensors.lse + rows, lse, mask=exists)
        _, rows, exists = tile_rows(first_token, num_tokens, kv_head, HEADS.H, GROUP, gl.SliceLayout(1, o_layout))
        column = gl.arange(0, D_V, gl.SliceLayout(0, o_layout))
        o = o.to(tensors.o.dtype.element_ty)
        gl.store(tensors.o + rows[:, None] * D_V + column[None, :], o, mask=exists[:, None])


@gluon.jit
def _forward_kernel(
    q_ptr,  # [T, H, D_QK]
    k_desc, v_desc,  # [S, H_KV * D]
    start_ptr, mask_ptr,  # [tiles, H_KV, U]
    size_ptr,  # [tiles, H_KV]
    o_ptr,  # [T, H, D_V]
    lse_ptr,  # [T, H]
    num_tokens, num_tiles, past, scale_log2, U,
    PARTS: gl.constexpr, HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Each program attends the queries of one tile after another, PARTS * ROWS rows each, KV head by KV head."""
    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEADS.D_QK], dtype)
    q = gl.allocate_shared_memory(dtype, [PARTS, ROWS, HEADS.D_QK], q_layout)
    k = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEADS.D_QK], k_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, ROWS, HEADS.D_V], v_desc.layout)
    memory = Memory(q, k, v, barriers(STAGES, 1), barriers(STAGES, PARTS))
    fence_async_shared()
    tensors, table = Tensors(q_ptr, o_ptr, lse_ptr), UnionTable(start_ptr, mask_ptr, size_ptr, U)
    keys, extent = Keys(k_desc, v_desc), Extent(num_tokens, num_tiles, past)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_multiply_forward, (tensors, table, memory, extent, scale_log2, 0, 2, HEADS, BLOCK_SIZE, STAGES)),
                (_multiply_forward, (tensors, table, memory, extent, scale_log2, 1, 2, HEADS, BLOCK_SIZE, STAGES)),
                (_load_forward, (keys, table, memory, num_tiles, HEADS, BLOCK_SIZE, STAGES)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_forward, (tensors, table, memory, extent, scale_log2, 0, 3, HEADS, BLOCK_SIZE, STAGES)),
                (_multiply_forward, (tensors, table, memory, extent, scale_log2, 1, 3, HEADS, BLOCK_SIZE, STAGES)),
                (_multiply_forward, (tensors, table, memory, extent, scale_log2, 2, 3, HEADS, BLOCK_SIZE, STAGES)),
                (_load_forward, (keys, table, memory, num_tiles, HEADS, BLOCK_SIZE, STAGES)),
            ],
            [4, 4, 1], [160, 160, 24],
        )  # fmt: skip


def launch_block_attention_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, document_start: Tensor, block_size: int, scale: float,
    past: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dispatch.block_attention` in Gluon, for groups of 4 heads and more."""
    (T, H, D_QK), (_, H_KV, D_V) = q.shape, v.shape
    o, lse = q.new_empty(T, H, D_V), q.new_empty(T, H, dtype=torch.float32)
    rows = ROWS.value
    parts = min(_PARTS, MAX_TILE_QUERIES * (H // H_KV) // rows)  # 2 in groups of 4
    stages = (_RING_BYTES // (rows * q.element_size()) - parts * D_QK) // (D_QK + D_V)
    unions = unite(block_indices, document_start, block_size, parts * rows * H_KV // H)
    num_tiles = unions.size.shape[0]
    _forward_kernel[(resident_programs(num_tiles * H_KV, q.device),)](
        q, tiles(k, rows), tiles(v, rows), *unions, o, lse,
        T, num_tiles, past, scale * LOG2_E.value, unions.start.shape[-1],
        parts, heads_of(q, v), block_size, stages, num_warps=4,
    )  # fmt: skip
    return o, lse


_PARTS, _RING_BYTES = 3, 224 * 2**10
"""Parts of a tile at most, and the shared memory of the ring and the tile's queries."""
