"""Who chose which block: the union of neighbouring queries' choices, and the queries of each block."""

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.primitives import ceil_div, padded, wide

# T packed tokens, H_kv KV heads, n slots a query (SLOTS), l' tokens a block (BLOCK_SIZE), B rows of the selection
# layout, U = tile queries * n slots of a tile's union, I items.

MAX_TILE_QUERIES = 32
"""Bits of a tile's mask."""


class Unions(NamedTuple):
    """The blocks that the queries of each tile and KV head chose."""

    start: Tensor  # int32 [tiles, H_kv, U], first token of the block, ascending
    mask: Tensor  # int32 [tiles, H_kv, U], bit i: the tile's query i chose the block
    size: Tensor  # int32 [tiles, H_kv]


class UnionTable(NamedTuple):
    """Unions as a kernel sees them."""

    start: Any  # [tiles, H_KV, slots]
    mask: Any  # [tiles, H_KV, slots]
    size: Any  # [tiles, H_KV]
    slots: Any


class Union(NamedTuple):
    """The blocks that the queries of one tile chose, as a kernel sees them."""

    start: Any  # [slots]
    mask: Any  # [slots]
    size: Any


@triton.jit
def _or_same_block(block_a, mask_a, block_b, mask_b):
    return block_b, tl.where(block_a == block_b, mask_a | mask_b, mask_b)


@triton.jit
def _union_kernel(
    indices_ptr,  # [T, H_KV, SLOTS], -1 for none
    document_start_ptr,  # [T]
    start_ptr, mask_ptr,  # [tiles, H_KV, QUERIES * SLOTS]
    size_ptr,  # [tiles, H_KV]
    num_tokens,
    H_KV: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """One program unites the choices of one tile and one KV head: sort by block, join equal neighbours."""
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, SORTED)
    query = i // SLOTS
    token = tile * QUERIES + query
    exists = (query < QUERIES) & (token < num_tokens)
    block = tl.load(indices_ptr + (token.to(tl.int64) * H_KV + kv_head) * SLOTS + i % SLOTS, mask=exists, other=-1)
    start = tl.load(document_start_ptr + token, mask=exists, other=0) + block * BLOCK_SIZE
    none = wide(1) << 62  # after every start
    key = tl.sort(tl.where(block >= 0, (start.to(tl.int64) << 32) | query, none))
    start = (key >> 32).to(tl.int32)
    start, mask = tl.associative_scan((start, 1 << (key & 31).to(tl.int32)), 0, _or_same_block)
    is_last = ((i == SORTED - 1) | (tl.gather(start, tl.minimum(i + 1, SORTED - 1), 0) != start)) & (key < none)
    slot = tl.cumsum(is_last.to(tl.int32), 0) - 1
    out = (tile.to(tl.int64) * H_KV + kv_head) * (QUERIES * SLOTS) + slot
    tl.store(start_ptr + out, start, mask=is_last)
    tl.store(mask_ptr + out, mask, mask=is_last)
    tl.store(size_ptr + tile * H_KV + kv_head, tl.sum(is_last.to(tl.int32), 0))


def unite(block_indices: Tensor, document_start: Tensor, block_size: int, queries: int) -> Unions:
    """The union of the blocks that each `queries` neighbouring queries chose."""
    T, H_KV, n = block_indices.shape
    tiles = ceil_div(T, queries)
    start, mask = (block_indices.new_empty(tiles, H_KV, queries * n) for _ in range(2))
    size = block_indices.new_empty(tiles, H_KV)
    _union_kernel[(tiles, H_KV)](
        block_indices, document_start, start, mask, size, T, H_KV, n, block_size, queries, padded(queries * n),
        num_warps=1 if queries * n <= 128 else 4,
    )  # fmt: skip
    return Unions(start, mask, size)


class InverseList(NamedTuple):
    """The queries that chose each block, cut into items of bounded length; int32.

    A row is a block of a KV head: KV head * B + row of the selection layout.
    """

    token: Tensor  # [T * H_kv * n], ascending in each row; empty slots at the end
    item_row: Tensor  # [I], -1 for an unused item
    item_begin: Tensor  # [I], into `token`
    item_end: Tensor  # [I]
    item_part: Tensor  # [I], where its partial sums go, -1 if the row has one item alone
    row_part: Tensor  # [H_kv * B], first partial sums of the row
    row_items: Tensor  # [H_kv * B]
    num_parts: int


def inverse_list(block_indices: Tensor, first_block: Tensor, num_blocks: int, item_length: int) -> InverseList:
    """Turn the chosen blocks of each query into the queries of each block.

    Args:
        block_indices: int32 [T, H_kv, n], -1 for none.
        first_block: block row of each token's document, int32 [T].
        num_blocks: rows B of the selection layout.
        item_length: most queries in an item.
    """
    T, H_KV, n = block_indices.shape
    num_rows, numbers = H_KV * num_blocks, partial(torch.arange, device=block_indices.device, dtype=torch.int32)
    head_row = numbers(0, num_rows, num_blocks)[:, None]
    row = torch.where(block_indices >= 0, first_block[:, None, None] + block_indices + head_row, num_rows)
    row, order = row.flatten().sort(stable=True)
    begin = torch.searchsorted(row, numbers(num_rows + 1), out_int32=True)
    items = ((begin.diff() + item_length - 1) // item_length).clamp_(min=1)
    cu_items = torch.cat([items.new_zeros(1), items.cumsum(0, dtype=torch.int32)])
    item = numbers(num_rows + T * H_KV * n // item_length)
    item_row = torch.searchsorted(cu_items[1:], item, right=True, out_int32=True)
    used = item_row < num_rows
    item_row.clamp_(max=num_rows - 1)
    within = item - cu_items.index_select(0, item_row)
    item_begin = begin.index_select(0, item_row) + within * item_length
    item_end = torch.minimum(item_begin + item_length, begin[1:].index_select(0, item_row))
    parts = torch.where(items > 1, items, 0)
    row_part = parts.cumsum(0, dtype=torch.int32) - parts
    divided = items.index_select(0, item_row) > 1
    return InverseList(
        (order // (H_KV * n)).int(),
        torch.where(used, item_row, -1),
        item_begin,
        item_end,
        torch.where(divided, row_part.index_select(0, item_row) + within, -1),
        row_part,
        items,
        2 * (T * H_KV * n // item_length) + 1,
    )
