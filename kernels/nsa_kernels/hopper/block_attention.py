"""Attention to chosen blocks and the gradients of their keys and values, in Gluon for Hopper: see `block_attention.py`.

Forward, a tile has two or three parts of ROWS rows, a multiplying group each. They share one ring of keys and values:
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_kernels.hopper.parts import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    ROWS,
    KeyGradients,
    KeyTile,
    add_queries_to_dkv,
    barriers,
    dkv_memory,
    load_key_block,
    load_keys,
    load_tile,
    resident_programs,
    rows_layout,
    softmax_end,
    start_dkv,
    store_keys,
    thread_barrier,
    tile_layout,
    tile_rows,
    tiles,
)
from nsa_kernels.triton.arguments import Keys, heads_of
from nsa_kernels.triton.block_attention import BlockGradients
from nsa_kernels.triton.block_lists import MAX_TILE_QUERIES, Union, UnionTable, unite
from nsa_kernels.triton.primitives import ceil_div

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, B blocks, I items of the list.

_FOREVER = gl.constexpr(2**31 - 1)


class Memory(NamedTuple):
    """Shared memory of a forward program, and where its warps meet."""

    q: Any  # [PARTS, ROWS, D_QK]
    k: Any  # [STAGES, ROWS, D_QK]
    v: Any  # [STAGES, ROWS, D_V]
    full: Any
    empty: Any


class Tensors(NamedTuple):
    """What a multiplying group of the forward reads and writes by itself."""

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


class Queries(NamedTuple):
    """Queries and what backward knows of them."""

    q: Any  # copies the rows of a group of [T * H, D_QK]
    do: Any  # copies the rows of a group of [T * H, D_V]
    lse: Any  # [T, H]
    delta: Any
    listed: Any  # [T * H_KV * n], who chose each block


class Items(NamedTuple):
    """Items of an inverse list and the blocks that they are of."""

    row: Any  # [I]
    begin: Any
    end: Any
    part: Any
    block_start: Any  # [B]
    block_end: Any
    num_blocks: Any


class Item(NamedTuple):
    """Some of the queries that chose a block, and a run of its keys."""

    begin: Any  # into the list
    end: Any
    part: Any
    kv_head: Any
    first_key: Any
    num_keys: Any


class Gradients(NamedTuple):
    """Where the gradients of keys and values go."""

    dk: Any  # [T, H_KV, D]
    dv: Any
    dk_part: Any  # float32 [parts, BLOCK_SIZE, D]
    dv_part: Any


@gluon.jit
def _find_item(item, items, run):
    """An item and its run of ROWS keys; without queries if it has no keys."""
    row = gl.load(items.row + item)
    block = gl.maximum(row, 0) % items.num_blocks
    first_key = gl.load(items.block_start + block) + run * ROWS
    num_keys = gl.where(row >= 0, gl.maximum(gl.load(items.block_end + block) - first_key, 0), 0)
    begin, end = gl.load(items.begin + item), gl.load(items.end + item)
    end = gl.where(num_keys > 0, end, begin)
    kv_head = gl.maximum(row, 0) // items.num_blocks
    return Item(begin, end, gl.load(items.part + item), kv_head, first_key, num_keys)


@gluon.jit
def _item_if(exists, item):
    """The item if it exists, or one without queries and keys."""
    num_keys, end = gl.where(exists, item.num_keys, 0), gl.where(exists, item.end, item.begin)
    return Item(item.begin, end, item.part, item.kv_head, item.first_key, num_keys)


@gluon.jit
def _load_queries(queries, keys, key_block, ring, item, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """A loading warp: the keys once, then the listed queries, ROWS / GROUP of them in a step."""
    GROUP: gl.constexpr = HEADS.GROUP
    begin, end, kv_head = item.begin, item.end, item.kv_head
    r = gl.arange(0, ROWS, gl.BlockedLayout([ROWS // 32], [32], [1], [0]))
    if begin < end:
        load_key_block(item.first_key, kv_head, keys, key_block, HEADS)
    step_bytes: gl.constexpr = (queries.q.block_type.nbytes + queries.do.block_type.nbytes) * (ROWS // GROUP)
    listed = gl.minimum(begin + r // GROUP, end - 1)
    token = gl.load(queries.listed + listed, mask=listed >= begin, other=0)
    for i in range(gl.cdiv(end - begin, ROWS // GROUP)):
        first = begin + i * (ROWS // GROUP)
        stage = i % STAGES
        exists = first + r // GROUP < end
        rows = token.to(gl.int64) * HEADS.H + kv_head * GROUP + r % GROUP
        lse = gl.load(queries.lse + rows, mask=exists, other=-HIDDEN)  # p = 0 in rows that do not exist
        delta = gl.load(queries.delta + rows, mask=exists, other=0.0)
        mbarrier.wait(ring.empty.index(stage), i // STAGES & 1 ^ 1)
        full, q, do = ring.full.index(stage), ring.q.index(stage), ring.do.index(stage)
        mbarrier.expect(full, step_bytes)
        for j in gl.static_range(ROWS // GROUP):
            row = gl.load(queries.listed + gl.minimum(first + j, end - 1)) * HEADS.H + kv_head * GROUP
            tma.async_copy_global_to_shared(queries.q, [row, 0], full, q.slice(j * GROUP, GROUP))
            tma.async_copy_global_to_shared(queries.do, [row, 0], full, do.slice(j * GROUP, GROUP))
        ring.lse.index(stage).store(lse * LOG2_E)
        ring.delta.index(stage).store(delta)
        ring.token.index(stage).store(token)
        token = gl.load(queries.listed + gl.minimum(first + ROWS // GROUP + r // GROUP, end - 1))  # of the next step
        thread_barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def _multiply_keys(
    grads, key_block, ring, item, run, scale,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: dk and dv of an item's keys; zeros where nobody chose the block."""
    H_KV: gl.constexpr = HEADS.H_KV
    D_QK: gl.constexpr = HEADS.D_QK
    D_V: gl.constexpr = HEADS.D_V
    first_key, num_keys = item.first_key, item.num_keys
    products = gl.zeros([ROWS, ROWS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]))
    dk = gl.zeros([ROWS, D_QK], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_QK, 16]))
    dv = gl.zeros([ROWS, D_V], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16]))
    if item.begin < item.end:
        products, dk, dv = start_dkv(key_block.k, key_block, ring, HEADS)
    steps = gl.cdiv(item.end - item.begin, ROWS // HEADS.GROUP)
    key_layout: gl.constexpr = gl.SliceLayout(1, products.type.layout)
    key, forever = first_key + gl.arange(0, ROWS, key_layout), gl.full([ROWS], _FOREVER, gl.int32, key_layout)
    keys = KeyTile(key_block.k, key_block.v, key, forever)
    _, dk, dv = add_queries_to_dkv(
        KeyGradients(products, dk, dv), 0, steps, steps, keys, ring, scale * LOG2_E, True, STAGES
    )
    if item.part < 0:
        row = first_key.to(gl.int64) * H_KV + item.kv_head
        store_keys(grads.dk, dk * scale, row, H_KV, num_keys, D_QK)
        store_keys(grads.dv, dv, row, H_KV, num_keys, D_V)
    else:
        row = item.part.to(gl.int64) * BLOCK_SIZE + run * ROWS
        store_keys(grads.dk_part, dk * scale, row, 1, num_keys, D_QK)
        store_keys(grads.dv_part, dv, row, 1, num_keys, D_V)


@gluon.jit
def _dkv_kernel(
    q_desc, do_desc,  # [T * H, D]
    k_desc, v_desc,  # [T, H_KV * D]
    lse_ptr, delta_ptr,  # [T, H]
    token_ptr,  # [T * H_KV * n]
    item_row_ptr, item_begin_ptr, item_end_ptr, item_part_ptr,  # [I]
    block_start_ptr, block_end_ptr,  # [B]
    dk_ptr, dv_ptr,  # [T, H_KV, D]
    dk_part_ptr, dv_part_ptr,  # float32 [parts, BLOCK_SIZE, D]
    num_items, num_blocks, scale,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One program computes what the queries of two items give to dk and dv of ROWS keys of their blocks each."""
    first, second, run = 2 * gl.program_id(0), 2 * gl.program_id(0) + 1, gl.program_id(1)
    items = Items(item_row_ptr, item_begin_ptr, item_end_ptr, item_part_ptr, block_start_ptr, block_end_ptr, num_blocks)
    item_a = _find_item(first, items, run)
    item_b = _item_if(second < num_items, _find_item(gl.minimum(second, num_items - 1), items, run))
    block_a, ring_a = dkv_memory(ROWS, 1, q_desc.dtype, HEADS, STAGES)
    block_b, ring_b = dkv_memory(ROWS, 1, q_desc.dtype, HEADS, STAGES)
    fence_async_shared()
    queries, keys = Queries(q_desc, do_desc, lse_ptr, delta_ptr, token_ptr), Keys(k_desc, v_desc)
    grads = Gradients(dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr)
    gl.warp_specialize(
        [
            (_multiply_keys, (grads, block_a, ring_a, item_a, run, scale, HEADS, BLOCK_SIZE, STAGES)),
            (_multiply_keys, (grads, block_b, ring_b, item_b, run, scale, HEADS, BLOCK_SIZE, STAGES)),
            (_load_queries, (queries, keys, block_a, ring_a, item_a, HEADS, STAGES)),
            (_load_queries, (queries, keys, block_b, ring_b, item_b, HEADS, STAGES)),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


def launch_block_gradients_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gradients: BlockGradients,
    block_start: Tensor, block_end: Tensor, block_size: int, scale: float,
) -> None:  # fmt: skip
    """Write the parts of `dispatch.block_gradients` in Gluon."""
    group_size = q.shape[1] // v.shape[1]
    lists, rows = gradients.lists, ROWS.value
    num_items = len(lists.item_row)
    items = (lists.token, lists.item_row, lists.item_begin, lists.item_end, lists.item_part)
    _dkv_kernel[(ceil_div(num_items, 2), block_size // rows)](
        _groups(q, group_size), _groups(do, group_size), tiles(k, rows), tiles(v, rows), lse, delta,
        *items, block_start, block_end, *gradients.whole, *gradients.parts, num_items, len(block_start), scale,
        heads_of(q, v), block_size, _STAGES, num_warps=4,
    )  # fmt: skip


def _groups(x: Tensor, group_size: int) -> TensorDescriptor:
    """Copies the rows of one token and KV head of a contiguous x [T, H, D] into a tile of ROWS rows."""
    if x.data_ptr() % 16:  # as the copy engine wants it
        x = x.clone()
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [group_size, x.shape[-1]], tile_layout(x, ROWS.value))


_STAGES = 2
_PARTS, _RING_BYTES = 3, 224 * 2**10
"""Forward: parts of a tile at most, and the shared memory of the ring and the tile's queries."""
