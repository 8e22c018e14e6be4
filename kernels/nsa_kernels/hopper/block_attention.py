"""Attention to chosen blocks and the gradients of their keys and values, in Gluon for Hopper: see `block_attention.py`.

Forward, a tile has two or three parts of ROWS rows, a multiplying group each. They share one ring of keys and values:
what several chose is read from the L2 cache once, and a part passes over the blocks that none of its queries chose.

Also how a tile walks the union of its blocks, for `query_gradient.py`.
"""

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
    add_queries_to_dkv,
    barriers,
    load_keys,
    load_tile,
    resident_programs,
    ring,
    rows_layout,
    softmax_end,
    start_dkv,
    store_keys,
    thread_barrier,
    tile_layout,
    tile_rows,
    tiles,
)
from nsa_kernels.triton.block_attention import BlockGradients
from nsa_kernels.triton.block_lists import MAX_TILE_QUERIES, unite
from nsa_kernels.triton.primitives import ceil_div

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, B blocks, I items of the list.

_FOREVER = gl.constexpr(2**31 - 1)


@gluon.jit
def load_union(
    first_step, start_ptr, size, k_desc, v_desc, kv_head, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
    D_QK: gl.constexpr, D_V: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and values of a tile's union, ROWS of them in a step."""
    for run in range(size * (BLOCK_SIZE // ROWS)):
        start = gl.load(start_ptr + run // (BLOCK_SIZE // ROWS)) + run % (BLOCK_SIZE // ROWS) * ROWS
        load_keys(first_step + run, start, k_desc, v_desc, kv_head, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
                  D_QK, D_V, STAGES)  # fmt: skip


@gluon.jit
def union_step(start_ptr, mask_ptr, run, runs, BLOCK_SIZE: gl.constexpr):
    """First key of a step of the union and who chose its block; nobody past the end."""
    block = gl.minimum(run, runs - 1) // (BLOCK_SIZE // ROWS)
    start = gl.load(start_ptr + block) + run % (BLOCK_SIZE // ROWS) * ROWS
    return start, gl.load(mask_ptr + block)


@gluon.jit
def union_of(tile, kv_head, num_tiles, start_ptr, mask_ptr, size_ptr, U, H_KV: gl.constexpr):
    """Where the union of a tile lies, and its size: 0 past the last tile."""
    row = gl.minimum(tile, num_tiles - 1).to(gl.int64) * H_KV + kv_head
    return start_ptr + row * U, mask_ptr + row * U, gl.where(tile < num_tiles, gl.load(size_ptr + row), 0)


@gluon.jit
def _load_forward(
    descriptors, unions, shared, num_tiles,
    H_KV: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: the keys and values of the unions of all tiles of the program, ROWS of them in a step."""
    k_desc, v_desc = descriptors
    start_ptr, mask_ptr, size_ptr, U = unions
    k_smem, v_smem, full, empty = shared[1:]
    step = 0
    for item in range(gl.program_id(0), num_tiles * H_KV, gl.num_programs(0)):
        tile, kv_head = item % num_tiles, item // num_tiles
        starts, masks, size = union_of(tile, kv_head, num_tiles, start_ptr, mask_ptr, size_ptr, U, H_KV)
        runs = size * (BLOCK_SIZE // ROWS)
        start = union_step(starts, masks, 0, gl.maximum(runs, 1), BLOCK_SIZE)[0]
        for run in range(runs):
            stage, phase = step % STAGES, step // STAGES & 1
            next_start = union_step(starts, masks, run + 1, runs, BLOCK_SIZE)[0]
            mbarrier.wait(empty.index(stage), phase ^ 1)
            mbarrier.expect(full.index(stage), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [start, kv_head * D_QK], full.index(stage), k_smem.index(stage))
            tma.async_copy_global_to_shared(v_desc, [start, kv_head * D_V], full.index(stage), v_smem.index(stage))
            start = next_start
            step += 1


@gluon.jit
def _load_own_queries(
    q_ptr, q, first_token, num_tokens, kv_head,
    H: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr,
):  # fmt: skip
    """Bring the queries of a part to shared memory."""
    layout: gl.constexpr = gl.SliceLayout(1, rows_layout(D_QK))
    _, rows, _ = tile_rows(first_token, num_tokens, kv_head, H, GROUP, layout)
    q.store(load_tile(q_ptr, rows, D_QK))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _multiply_forward(
    tensors, unions, shared, num_tokens, num_tiles, past, scale_log2,
    PART: gl.constexpr, PARTS: gl.constexpr, H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr,
    D_V: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: one part of each tile, and of the tile's union the blocks that its queries chose.

    Rows that did not choose a block are hidden as in `block_attention.py`.
    """
    q_ptr, o_ptr, lse_ptr = tensors
    start_ptr, mask_ptr, size_ptr, U = unions
    q_smem, k_smem, v_smem, full, empty = shared
    QUERIES: gl.constexpr = ROWS // GROUP
    H: gl.constexpr = H_KV * GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    q = q_smem.index(PART)
    step = 0
    for item in range(gl.program_id(0), num_tiles * H_KV, gl.num_programs(0)):
        tile, kv_head = item % num_tiles, item // num_tiles
        starts, masks, size = union_of(tile, kv_head, num_tiles, start_ptr, mask_ptr, size_ptr, U, H_KV)
        first_token = (tile * PARTS + PART) * QUERIES
        _load_own_queries(q_ptr, q, first_token, num_tokens, kv_head, H, GROUP, D_QK)
        token, rows, exists = tile_rows(first_token, num_tokens, kv_head, H, GROUP, row)
        query = gl.arange(0, ROWS, row) // GROUP
        row_max, row_sum = gl.full([ROWS], LOWEST, gl.float32, row), gl.zeros([ROWS], gl.float32, row)
        acc = gl.zeros([ROWS, D_V], gl.float32, o_layout)
        runs = size * (BLOCK_SIZE // ROWS)
        start, chosen = union_step(starts, masks, 0, gl.maximum(runs, 1), BLOCK_SIZE)
        for run in range(runs):
            stage = step % STAGES
            next_start, next_chosen = union_step(starts, masks, run + 1, runs, BLOCK_SIZE)
            chosen = chosen >> (PART * QUERIES)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            if (chosen & ((1 << QUERIES) - 1)) != 0:
                k, v = k_smem.index(stage).permute((1, 0)), v_smem.index(stage)
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
                p = gl.convert_layout(p.to(q_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
                acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v, acc, is_async=True)])
            mbarrier.arrive(empty.index(stage), count=1)
            start, chosen = next_start, next_chosen
            step += 1
        o, lse = softmax_end(acc, row_max, row_sum)
        gl.store(lse_ptr + rows, lse, mask=exists)
        _, rows, exists = tile_rows(first_token, num_tokens, kv_head, H, GROUP, gl.SliceLayout(1, o_layout))
        column = gl.arange(0, D_V, gl.SliceLayout(0, o_layout))
        gl.store(o_ptr + rows[:, None] * D_V + column[None, :], o.to(o_ptr.dtype.element_ty), mask=exists[:, None])


@gluon.jit
def _forward_kernel(
    q_ptr,  # [T, H, D_QK]
    k_desc, v_desc,  # [S, H_KV * D]
    start_ptr, mask_ptr,  # [tiles, H_KV, U]
    size_ptr,  # [tiles, H_KV]
    o_ptr,  # [T, H, D_V]
    lse_ptr,  # [T, H]
    num_tokens, num_tiles, past, scale_log2, U,
    PARTS: gl.constexpr, H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Each program attends the queries of one tile after another, PARTS * ROWS rows each, KV head by KV head."""
    dtype: gl.constexpr = k_desc.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_QK], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [PARTS, ROWS, D_QK], q_layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D_QK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D_V], v_desc.layout)
    full, empty = barriers(STAGES, 1), barriers(STAGES, PARTS)
    fence_async_shared()
    tensors, unions = (q_ptr, o_ptr, lse_ptr), (start_ptr, mask_ptr, size_ptr, U)
    shared = (q_smem, k_smem, v_smem, full, empty)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_multiply_forward, (tensors, unions, shared, num_tokens, num_tiles, past, scale_log2,
                                     0, 2, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
                (_multiply_forward, (tensors, unions, shared, num_tokens, num_tiles, past, scale_log2,
                                     1, 2, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
                (_load_forward, ((k_desc, v_desc), unions, shared, num_tiles, H_KV, D_QK, D_V, BLOCK_SIZE, STAGES)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply_forward, (tensors, unions, shared, num_tokens, num_tiles, past, scale_log2,
                                     0, 3, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
                (_multiply_forward, (tensors, unions, shared, num_tokens, num_tiles, past, scale_log2,
                                     1, 3, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
                (_multiply_forward, (tensors, unions, shared, num_tokens, num_tiles, past, scale_log2,
                                     2, 3, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
                (_load_forward, ((k_desc, v_desc), unions, shared, num_tiles, H_KV, D_QK, D_V, BLOCK_SIZE, STAGES)),
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
        parts, H_KV, H // H_KV, D_QK, D_V, block_size, stages, num_warps=4,
    )  # fmt: skip
    return o, lse


@gluon.jit
def _find_item(item, lists, block_start_ptr, block_end_ptr, num_blocks, run):
    """Range in the list, part, KV head, first key and number of keys of an item's run of ROWS keys."""
    _, item_row_ptr, item_begin_ptr, item_end_ptr, item_part_ptr = lists
    row = gl.load(item_row_ptr + item)
    block = gl.maximum(row, 0) % num_blocks
    first_key = gl.load(block_start_ptr + block) + run * ROWS
    num_keys = gl.where(row >= 0, gl.maximum(gl.load(block_end_ptr + block) - first_key, 0), 0)
    begin, end = gl.load(item_begin_ptr + item), gl.load(item_end_ptr + item)
    end = gl.where(num_keys > 0, end, begin)
    return begin, end, gl.load(item_part_ptr + item), gl.maximum(row, 0) // num_blocks, first_key, num_keys


@gluon.jit
def _load_queries(
    inputs, lists, shared, place,
    H: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A loading warp: the keys once, then the listed queries, ROWS / GROUP of them in a step."""
    q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr = inputs
    token_ptr = lists[0]
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, token_smem, kv_full, full, empty = shared
    begin, end, _, kv_head, first_key, _ = place
    r = gl.arange(0, ROWS, gl.BlockedLayout([ROWS // 32], [32], [1], [0]))
    if begin < end:
        mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [first_key, kv_head * D_QK], kv_full.index(0), k_smem)
        tma.async_copy_global_to_shared(v_desc, [first_key, kv_head * D_V], kv_full.index(0), v_smem)
    step_bytes: gl.constexpr = (q_desc.block_type.nbytes + do_desc.block_type.nbytes) * (ROWS // GROUP)
    listed = gl.minimum(begin + r // GROUP, end - 1)
    token = gl.load(token_ptr + listed, mask=listed >= begin, other=0)
    for i in range(gl.cdiv(end - begin, ROWS // GROUP)):
        first = begin + i * (ROWS // GROUP)
        stage = i % STAGES
        exists = first + r // GROUP < end
        rows = token.to(gl.int64) * H + kv_head * GROUP + r % GROUP
        lse = gl.load(lse_ptr + rows, mask=exists, other=-HIDDEN)  # p = 0 in rows that do not exist
        delta = gl.load(delta_ptr + rows, mask=exists, other=0.0)
        mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), step_bytes)
        for j in gl.static_range(ROWS // GROUP):
            row = gl.load(token_ptr + gl.minimum(first + j, end - 1)) * H + kv_head * GROUP
            q_rows, do_rows = q_smem.index(stage).slice(j * GROUP, GROUP), do_smem.index(stage).slice(j * GROUP, GROUP)
            tma.async_copy_global_to_shared(q_desc, [row, 0], full.index(stage), q_rows)
            tma.async_copy_global_to_shared(do_desc, [row, 0], full.index(stage), do_rows)
        lse_smem.index(stage).store(lse * LOG2_E)
        delta_smem.index(stage).store(delta)
        token_smem.index(stage).store(token)
        token = gl.load(token_ptr + gl.minimum(first + ROWS // GROUP + r // GROUP, end - 1))  # of the next step
        thread_barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _multiply_keys(
    outputs, shared, place, run, scale,
    H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: dk and dv of an item's keys; zeros where nobody chose the block."""
    dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr = outputs
    begin, end, part, kv_head, first_key, num_keys = place
    k, v = shared[0], shared[1]
    products = gl.zeros([ROWS, ROWS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]))
    dk = gl.zeros([ROWS, D_QK], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_QK, 16]))
    dv = gl.zeros([ROWS, D_V], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16]))
    if begin < end:
        products, dk, dv = start_dkv(k, shared, D_QK, D_V)
    steps = gl.cdiv(end - begin, ROWS // GROUP)
    key_layout: gl.constexpr = gl.SliceLayout(1, products.type.layout)
    key, forever = first_key + gl.arange(0, ROWS, key_layout), gl.full([ROWS], _FOREVER, gl.int32, key_layout)
    _, dk, dv = add_queries_to_dkv((products, dk, dv), 0, steps, steps, k, v, shared, key, forever, scale * LOG2_E,
                                   True, STAGES)  # fmt: skip
    if part < 0:
        row = first_key.to(gl.int64) * H_KV + kv_head
        store_keys(dk_ptr, dk * scale, row, H_KV, num_keys, D_QK)
        store_keys(dv_ptr, dv, row, H_KV, num_keys, D_V)
    else:
        row = part.to(gl.int64) * BLOCK_SIZE + run * ROWS
        store_keys(dk_part_ptr, dk * scale, row, 1, num_keys, D_QK)
        store_keys(dv_part_ptr, dv, row, 1, num_keys, D_V)


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
    H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One program computes what the queries of two items give to dk and dv of ROWS keys of their blocks each."""
    first, second, run = 2 * gl.program_id(0), 2 * gl.program_id(0) + 1, gl.program_id(1)
    lists = (token_ptr, item_row_ptr, item_begin_ptr, item_end_ptr, item_part_ptr)
    place_a = _find_item(first, lists, block_start_ptr, block_end_ptr, num_blocks, run)
    place_b = _find_item(gl.minimum(second, num_items - 1), lists, block_start_ptr, block_end_ptr, num_blocks, run)
    begin, end, part, kv_head, first_key, num_keys = place_b
    num_keys = gl.where(second < num_items, num_keys, 0)
    place_b = (begin, gl.where(second < num_items, end, begin), part, kv_head, first_key, num_keys)
    shared_a = _shared(q_desc.dtype, D_QK, D_V, STAGES)
    shared_b = _shared(q_desc.dtype, D_QK, D_V, STAGES)
    fence_async_shared()
    inputs = (q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr)
    outputs = (dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr)
    gl.warp_specialize(
        [
            (_multiply_keys, (outputs, shared_a, place_a, run, scale, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
            (_multiply_keys, (outputs, shared_b, place_b, run, scale, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
            (_load_queries, (inputs, lists, shared_a, place_a, H_KV * GROUP, GROUP, D_QK, D_V, STAGES)),
            (_load_queries, (inputs, lists, shared_b, place_b, H_KV * GROUP, GROUP, D_QK, D_V, STAGES)),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


@gluon.jit
def _shared(DTYPE: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory and barriers of one item."""
    k_smem = gl.allocate_shared_memory(DTYPE, [ROWS, D_QK], gl.NVMMASharedLayout.get_default_for([ROWS, D_QK], DTYPE))
    v_smem = gl.allocate_shared_memory(DTYPE, [ROWS, D_V], gl.NVMMASharedLayout.get_default_for([ROWS, D_V], DTYPE))
    q_smem, do_smem, lse_smem, delta_smem, token_smem = ring(DTYPE, D_QK, D_V, STAGES)
    kv_full, full, empty = barriers(1, 1), barriers(STAGES, 2), barriers(STAGES, 1)
    return k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, token_smem, kv_full, full, empty


def launch_block_gradients_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gradients: BlockGradients,
    block_start: Tensor, block_end: Tensor, block_size: int, scale: float,
) -> None:  # fmt: skip
    """Write the parts of `dispatch.block_gradients` in Gluon."""
    (_, H, D_QK), (_, H_KV, D_V) = q.shape, v.shape
    lists, rows = gradients.lists, ROWS.value
    num_items = len(lists.item_row)
    items = (lists.token, lists.item_row, lists.item_begin, lists.item_end, lists.item_part)
    _dkv_kernel[(ceil_div(num_items, 2), block_size // rows)](
        _groups(q, H // H_KV), _groups(do, H // H_KV), tiles(k, rows), tiles(v, rows), lse, delta,
        *items, block_start, block_end, *gradients.whole, *gradients.parts, num_items, len(block_start), scale,
        H_KV, H // H_KV, D_QK, D_V, block_size, _STAGES, num_warps=4,
    )  # fmt: skip


def _groups(x: Tensor, group_size: int) -> TensorDescriptor:
    """Copies the rows of one token and KV head of a contiguous x [T, H, D] into a tile of ROWS rows."""
    if x.data_ptr() % 16:  # as the copy engine wants it
        x = x.clone()
    return TensorDescriptor.from_tensor(x.view(-1, x.shape[-1]), [group_size, x.shape[-1]], tile_layout(x, ROWS.value))


_STAGES = 2
_PARTS, _RING_BYTES = 3, 224 * 2**10
"""Forward: parts of a tile at most, and the shared memory of the ring and the tile's queries."""
