"""Softmax attention over the tokens of chosen blocks: the kernels of the selected branch.

    o[t] = sum(softmax(q[t] · k[s] · scale) · v[s])   over   s in the blocks chosen by t, s <= t

Neighbouring queries choose mostly the same blocks. A tile of neighbours therefore walks the union of their choices
once, with one bit a query that says who chose the block; dk and dv come from the inverse list, block by block. Nothing
is added atomically: gradients are the same in every run.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.geometry import filled_slots
from nsa_kernels.triton.arguments import Keys, heads_of
from nsa_kernels.triton.block_lists import MAX_TILE_QUERIES, InverseList, Union, UnionTable, inverse_list, unite
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    block_descriptor,
    ceil_div,
    dot_precision,
    finite_part,
    load_block,
    load_rows,
    padded,
    row_addresses,
    softmax_end,
    spoil,
    store_rows,
    tile_rows,
    wide,
)
from nsa_kernels.triton.run_attention import Softmax
from nsa_kernels.triton.tuning import FittedTile, fitted_tile

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, n slots a query, l' tokens a block


class UnionPart(NamedTuple):
    """KEYS tokens of a block, and who chose it."""

    start: Any
    mask: Any


class TileQueries(NamedTuple):
    """The queries of a tile, as tokens."""

    token: Any  # [ROWS]
    first: Any
    last: Any


@triton.jit
def _union_part(union, i, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """The i-th run of KEYS tokens of a union."""
    block = i // (BLOCK_SIZE // KEYS)
    return UnionPart(tl.load(union.start + block) + i % (BLOCK_SIZE // KEYS) * KEYS, tl.load(union.mask + block))


@triton.jit
def blocks_before(union, first_key, document_start_ptr, tile, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """How many blocks of a union, its first, end no later than `first_key`: whoever chose one sees all of it.

    None where the queries of the tile are of two documents: infinity and NaN of one must not reach the other.
    """
    start = tl.load(document_start_ptr + tile.first)
    size = tl.where(start == tl.load(document_start_ptr + tile.last), union.size, 0)
    i = tl.arange(0, triton.next_power_of_2(SLOTS))
    start = tl.load(union.start + i, mask=i < size, other=first_key + 1)
    return tl.sum((start + BLOCK_SIZE - 1 <= first_key).to(tl.int32), 0)


@triton.jit
def _add_blocks(
    softmax, q, keys, union, begin, stop, key, query, kv_head, scale_log2,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) of a union; the queries stand at `key`. Only at the EDGE has a block keys after one of them.

    A row that did not choose a block keeps its maximum, and what is subtracted from its scores leaves weights of 0.
    """
    row_max, row_sum, acc = softmax
    for i in tl.range(begin, stop):
        start, mask = _union_part(union, i, BLOCK_SIZE, KEYS)
        k = load_block(keys.k, start, kv_head, KEYS, HEADS.BLOCK_QK)
        v = load_block(keys.v, start, kv_head, KEYS, HEADS.BLOCK_V)
        chose = (mask >> query) & 1 != 0
        products = tl.dot(q, k.T, input_precision=PRECISION)
        if EDGE:
            seen = ((start + tl.arange(0, KEYS))[None, :] <= key[:, None]) & chose[:, None]
            products = tl.where(seen, products, HIDDEN)
            v, spoilt = finite_part(v)
            acc = spoil(acc, seen, spoilt)
        new_max = tl.where(chose, tl.maximum(row_max, tl.max(products, 1) * scale_log2), row_max)
        p = tl.exp2(products * scale_log2 - tl.where(chose, new_max, -LOWEST)[:, None])
        shrink = tl.exp2(row_max - new_max)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        row_max, row_sum = new_max, row_sum * shrink + tl.sum(p, 1)
    return Softmax(row_max, row_sum, acc)


@triton.jit
def find_union(tile, kv_head, table, H_KV: tl.constexpr):
    """The union of a tile."""
    row, size = (tile.to(tl.int64) * H_KV + kv_head) * table.slots, tl.load(table.size + tile * H_KV + kv_head)
    return Union(table.start + row, table.mask + row, size)


@triton.jit
def _forward_kernel(
    q_ptr,  # [T, H, D_QK]
    k_desc, v_desc,  # [T, H_KV, D]
    document_start_ptr,  # [T]
    start_ptr, mask_ptr,  # [tiles, H_KV, U]
    size_ptr,  # [tiles, H_KV]
    o_ptr,  # [T, H, D_V]
    lse_ptr,  # [T, H]
    num_tokens, past, scale_log2, U,
    HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one tile and one KV head to the union of their blocks.

    Query t is the token `past + t` of the keys.
    """
    QUERIES: tl.constexpr = TILE.QUERIES
    ROWS: tl.constexpr = TILE.ROWS
    KEYS: tl.constexpr = TILE.KEYS
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    tile, kv_head, keys = tl.program_id(0), tl.program_id(1), Keys(k_desc, v_desc)
    token, head, exists = tile_rows(tile * QUERIES, num_tokens, HEADS.GROUP, QUERIES, ROWS)
    rows = row_addresses(token, kv_head * HEADS.GROUP + head, HEADS.H)
    q = load_rows(q_ptr, rows, HEADS.D_QK, HEADS.BLOCK_QK)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    softmax = Softmax(tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32), acc)
    union = find_union(tile, kv_head, UnionTable(start_ptr, mask_ptr, size_ptr, U), HEADS.H_KV)
    key, query = past + token, token - tile * QUERIES
    queries = TileQueries(token, tile * QUERIES, tl.minimum(tile * QUERIES + QUERIES, num_tokens) - 1)
    whole = blocks_before(union, past + queries.first, document_start_ptr, queries, QUERIES * SLOTS, BLOCK_SIZE)
    whole *= BLOCK_SIZE // KEYS
    softmax = _add_blocks(softmax, q, keys, union, 0, whole, key, query, kv_head, scale_log2,
                          HEADS, BLOCK_SIZE, KEYS, False, PRECISION)  # fmt: skip
    softmax = _add_blocks(softmax, q, keys, union, whole, union.size * (BLOCK_SIZE // KEYS), key, query, kv_head,
                          scale_log2, HEADS, BLOCK_SIZE, KEYS, True, PRECISION)  # fmt: skip
    o, lse = softmax_end(softmax.row_max, softmax.row_sum, softmax.acc)
    store_rows(o_ptr, rows, exists, o, HEADS.D_V, BLOCK_V)
    tl.store(lse_ptr + rows, lse, mask=exists)


@triton.jit
def add_blocks_to_dq(
    dq, rows, keys, union, document_start_ptr, queries, kv_head, scale_log2,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds · k of the blocks of a tile's union to dq; SLOTS are those of all its queries."""
    whole = blocks_before(union, queries.first, document_start_ptr, queries, SLOTS, BLOCK_SIZE)
    whole, end = whole * (BLOCK_SIZE // KEYS), union.size * (BLOCK_SIZE // KEYS)
    dq = _add_steps_to_dq(dq, rows, keys, union, 0, whole, queries, kv_head, scale_log2,
                          HEADS, BLOCK_SIZE, KEYS, False, PRECISION)  # fmt: skip
    return _add_steps_to_dq(dq, rows, keys, union, whole, end, queries, kv_head, scale_log2,
                            HEADS, BLOCK_SIZE, KEYS, True, PRECISION)  # fmt: skip


@triton.jit
def _add_steps_to_dq(
    dq, rows, keys, union, begin, stop, queries, kv_head, scale_log2,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) of a union add ds · k to dq."""
    token = queries.token
    for i in tl.range(begin, stop):
        start, mask = _union_part(union, i, BLOCK_SIZE, KEYS)
        k = load_block(keys.k, start, kv_head, KEYS, HEADS.BLOCK_QK)
        v = load_block(keys.v, start, kv_head, KEYS, HEADS.BLOCK_V)
        last = tl.where((mask >> (token - queries.first)) & 1 != 0, token, -1)
        s = start + tl.arange(0, KEYS)
        p = tl.exp2(tl.dot(rows.q, k.T, input_precision=PRECISION) * scale_log2 - rows.lse[:, None])
        ds = p * (tl.dot(rows.do, v.T, input_precision=PRECISION) - rows.delta[:, None])
        ds = tl.where(s[None, :] <= last[:, None], ds, 0.0)
        if EDGE:
            k, _ = finite_part(k)  # of a key that is seen ds itself is not finite
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dkv_kernel(
    q_ptr,  # [T, H, D_QK]
    k_ptr, v_ptr,  # [T, H_KV, D]
    do_ptr,  # [T, H, D_V]
    lse_ptr, delta_ptr,  # [T, H]
    token_ptr,  # [T * H_KV * n]
    item_row_ptr, item_begin_ptr, item_end_ptr, item_part_ptr,  # [I]
    block_start_ptr, block_end_ptr,  # [B]
    dk_ptr, dv_ptr,  # [T, H_KV, D]
    dk_part_ptr, dv_part_ptr,  # float32 [parts, BLOCK_SIZE, D]
    num_blocks, num_tokens, scale,
    HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes what one item's queries give to dk and dv of their block, or of a run of its tokens."""
    H_KV: tl.constexpr = HEADS.H_KV
    GROUP: tl.constexpr = HEADS.GROUP
    D_QK: tl.constexpr = HEADS.D_QK
    D_V: tl.constexpr = HEADS.D_V
    BLOCK_QK: tl.constexpr = HEADS.BLOCK_QK
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    QUERIES: tl.constexpr = TILE.QUERIES
    KEYS: tl.constexpr = TILE.KEYS
    item = tl.program_id(0)
    row = tl.load(item_row_ptr + item)
    block_start = tl.load(block_start_ptr + tl.maximum(row, 0) % num_blocks)
    block_end = tl.load(block_end_ptr + tl.maximum(row, 0) % num_blocks)
    begin, end = tl.load(item_begin_ptr + item), tl.load(item_end_ptr + item)
    if (row >= 0) & (block_start < block_end):
        kv_head = row // num_blocks
        slot = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
        s = block_start + slot
        keys = row_addresses(tl.minimum(s, num_tokens - 1), kv_head, H_KV)
        k, v = load_rows(k_ptr, keys, D_QK, BLOCK_QK), load_rows(v_ptr, keys, D_V, BLOCK_V)
        dk, dv = tl.zeros([KEYS, BLOCK_QK], tl.float32), tl.zeros([KEYS, BLOCK_V], tl.float32)
        r = tl.arange(0, TILE.ROWS)
        head = kv_head * GROUP + r % GROUP
        for first in tl.range(begin, end, QUERIES):
            listed = first + r // GROUP
            exists = (listed < end) & (r < QUERIES * GROUP)
            token = tl.load(token_ptr + tl.minimum(listed, end - 1))  # of this document in rows that do not exist too
            rows = row_addresses(token, head, HEADS.H)
            q, do = load_rows(q_ptr, rows, D_QK, BLOCK_QK), load_rows(do_ptr, rows, D_V, BLOCK_V)
            lse = tl.load(lse_ptr + rows, mask=exists, other=-HIDDEN) * LOG2_E  # p = 0 in rows that do not exist
            delta = tl.load(delta_ptr + rows)
            p = tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * (scale * LOG2_E) - lse[:, None])
            p = tl.where(s[None, :] <= token[:, None], p, 0.0)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(do, v.T, input_precision=PRECISION) - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
        part = tl.load(item_part_ptr + item)
        if part < 0:
            out = s.to(tl.int64) * H_KV + kv_head
            store_rows(dk_ptr, out, s < block_end, dk * scale, D_QK, BLOCK_QK)
            store_rows(dv_ptr, out, s < block_end, dv, D_V, BLOCK_V)
        else:
            out = part.to(tl.int64) * BLOCK_SIZE + slot
            store_rows(dk_part_ptr, out, s < block_end, dk * scale, D_QK, BLOCK_QK)
            store_rows(dv_part_ptr, out, s < block_end, dv, D_V, BLOCK_V)


@triton.jit
def _sum_parts_kernel(
    parts_ptr,  # float32 [parts, BLOCK_SIZE, D]
    row_part_ptr, row_items_ptr,  # [H_KV * B]
    block_start_ptr, block_end_ptr,  # [B]
    out_ptr,  # [T, H_KV, D]
    num_blocks,
    H_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program sums the parts of ROWS tokens of one block and KV head, in order, if it has more than one item."""
    block, kv_head = tl.program_id(0), tl.program_id(1)
    row = kv_head * num_blocks + block
    items = tl.load(row_items_ptr + row)
    if items > 1:
        start, end, part = (
            tl.load(block_start_ptr + block),
            tl.load(block_end_ptr + block),
            tl.load(row_part_ptr + row),
        )
        s = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
        exists = start + s < end
        mask = exists[:, None] & (tl.arange(0, BLOCK_D)[None, :] < D)
        total = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for i in range(items):
            rows = wide(part + i) * BLOCK_SIZE + s
            total += tl.load(parts_ptr + rows[:, None] * D + tl.arange(0, BLOCK_D)[None, :], mask=mask, other=0.0)
        store_rows(out_ptr, (start + s).to(tl.int64) * H_KV + kv_head, exists, total, D, BLOCK_D)


def union_tile(kernel: str, q: Tensor, v: Tensor, block_size: int) -> FittedTile:
    """The tile of a kernel that walks unions: no more queries than masks have bits, no more keys than a block."""
    group_size = q.shape[1] // v.shape[1]
    tile = fitted_tile(kernel, q, max(q.shape[-1], v.shape[-1]), group_size)
    tile = tile._replace(keys=min(tile.keys, block_size))
    if tile.queries > MAX_TILE_QUERIES:
        tile = tile._replace(queries=MAX_TILE_QUERIES, rows=padded(MAX_TILE_QUERIES * group_size))
    return tile


def launch_block_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, document_start: Tensor, block_size: int, scale: float,
    past: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dispatch.block_attention` in Triton."""
    (T, H, _), (_, H_KV, D_V) = q.shape, v.shape
    o, lse = q.new_empty(T, H, D_V), q.new_empty(T, H, dtype=torch.float32)
    tile = union_tile("selected_forward", q, v, block_size)
    unions = unite(block_indices, document_start, block_size, tile.queries)
    _forward_kernel[(ceil_div(T, tile.queries), H_KV)](
        q, block_descriptor(k, tile.keys), block_descriptor(v, tile.keys), document_start, *unions, o, lse,
        T, past, scale * LOG2_E.value, unions.start.shape[-1],
        heads_of(q, v), tile.sizes, block_size, block_indices.shape[2], dot_precision(q.dtype), **tile.options,
    )  # fmt: skip
    return o, lse


class BlockGradients(NamedTuple):
    """Where the gradients of keys and values go: blocks of one item, and parts of the items of the others."""

    lists: InverseList
    whole: tuple[Tensor, Tensor]  # dk [T, H_kv, D_qk] and dv [T, H_kv, D_v]
    parts: tuple[Tensor, Tensor]  # float32 [parts, l', D] each


def room_for_gradients(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, first_block: Tensor, num_blocks: int, block_size: int
) -> BlockGradients:
    """Room for the gradients of k and v, and the lists of the queries that chose each block."""
    lists = inverse_list(block_indices, first_block, num_blocks, max(_ITEM_LENGTH, len(q) // _ITEMS))
    dk_parts, dv_parts = (x.new_empty(lists.num_parts, block_size, x.shape[-1], dtype=torch.float32) for x in (k, v))
    return BlockGradients(lists, (torch.empty_like(k), torch.empty_like(v)), (dk_parts, dv_parts))


def launch_block_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, gradients: BlockGradients,
    block_start: Tensor, block_end: Tensor, block_size: int, scale: float,
) -> None:  # fmt: skip
    """Write the parts of `dispatch.block_gradients` in Triton."""
    (T, H, D_QK), (_, H_KV, D_V), lists = q.shape, v.shape, gradients.lists
    tile = fitted_tile("selected_dkv", q, max(D_QK, D_V), H // H_KV)
    tile = tile._replace(keys=min(tile.keys, block_size))
    _dkv_kernel[(len(lists.item_row), block_size // tile.keys)](
        q, k, v, do, lse, delta,
        lists.token, lists.item_row, lists.item_begin, lists.item_end, lists.item_part, block_start, block_end,
        *gradients.whole, *gradients.parts, len(block_start), T, scale,
        heads_of(q, v), tile.sizes, block_size, dot_precision(q.dtype), **tile.options,
    )  # fmt: skip


def sum_block_parts(
    gradients: BlockGradients, block_start: Tensor, block_end: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """dk and dv; blocks of many queries are summed part by part, in order."""
    lists, whole, parts = gradients
    for part, out in zip(parts, whole, strict=True):
        rows, H_KV = min(block_size, _SUMMED_ROWS), out.shape[1]
        _sum_parts_kernel[(len(block_start), H_KV, block_size // rows)](
            part, lists.row_part, lists.row_items, block_start, block_end, out, len(block_start),
            H_KV, out.shape[-1], padded(out.shape[-1]), block_size, rows,
        )  # fmt: skip
    return whole


def without_empty_slots(block_indices: Tensor, k: Tensor, block_size: int) -> Tensor:
    """The slots of block_indices [T, H_kv, n] that can hold a block of the keys k, where n is unusually large."""
    return block_indices[..., : filled_slots(block_indices.shape[-1], block_size, len(k))].contiguous()


_SUMMED_ROWS = 128
"""Tokens of a block whose parts a program sums."""

_ITEMS, _ITEM_LENGTH = 16, 512
"""A block that every query chose is cut into so many items, of at least so many queries: few sums, and none so long
that the others wait for it."""
