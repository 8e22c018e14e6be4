"""Gradients of keys and values of chosen blocks, written in Gluon for Hopper: see `triton/block_attention.py`."""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_kernels.hopper.parts import (
    HIDDEN,
    LOG2_E,
    ROWS,
    KeyGradients,
    KeyTile,
    add_queries_to_dkv,
    dkv_memory,
    load_key_block,
    start_dkv,
    store_keys,
    thread_barrier,
    tile_layout,
    tiles,
)
from nsa_kernels.triton.arguments import Keys, heads_of
from nsa_kernels.triton.block_attention import BlockGradients
from nsa_kernels.triton.primitives import ceil_div

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, B blocks, I items of the list.

_FOREVER = gl.constexpr(2**31 - 1)


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
