"""The gradient of the queries through all branches at once, and that of the gates.

With do the gradient of the gated sum, branch b needs p · g_b · do for dv and p · (g_b · do · v - g_b · o_b · do) for dq
and dk: the gate only scales p. It is folded into the log-sum-exp, g · p = exp(s - (lse - ln g)), and then every branch
reads the same do, with delta_b = o_b · do, which is also the gradient of g_b. Gates are therefore not negative.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.arguments import Keys, Runs, heads_of
from nsa_kernels.triton.block_attention import TileQueries, add_blocks_to_dq, find_union, union_tile
from nsa_kernels.triton.block_lists import UnionTable, unite
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    block_descriptor,
    ceil_div,
    dot_precision,
    load_rows,
    row_addresses,
    store_rows,
    tile_rows,
    wide,
)
from nsa_kernels.triton.run_attention import QueryRows, add_runs_to_dq

# T packed tokens, H query heads, D_v head dim of the values. Branches: compressed, selected, sliding.


class Attention(NamedTuple):
    """What a branch gave."""

    o: Any  # [T, H, D_V]
    lse: Any  # [T, H]


class Written(NamedTuple):
    """What is written for each branch."""

    gates: Any  # [T, H, 3], their gradients
    delta: Any  # float32 [3, T, H]
    shifted: Any  # float32 [3, T, H]


@triton.jit
def _fold_gate(
    q, do, branch, gates_ptr, written, rows, exists, num_tokens, BRANCH: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """delta = o · do, the gate's gradient, and lse - ln(gate) of a branch; a gate of 0 shifts so far that p is 0.

    A negative gate has no logarithm: p and all gradients through it would be NaN, which no run takes for a result.
    """
    delta = tl.sum(load_rows(branch.o, rows, HEADS.D_V, HEADS.BLOCK_V).to(tl.float32) * do.to(tl.float32), 1)
    gate = tl.load(gates_ptr + BRANCH + 3 * rows).to(tl.float32)
    shifted = tl.where(gate == 0, -HIDDEN, tl.load(branch.lse + rows) - tl.log(gate))
    first = BRANCH * (wide(num_tokens) * HEADS.H_KV * HEADS.GROUP)
    tl.store(written.delta + first + rows, delta, mask=exists)
    tl.store(written.shifted + first + rows, shifted, mask=exists)
    tl.store(written.gates + BRANCH + 3 * rows, delta.to(written.gates.dtype.element_ty), mask=exists)
    return QueryRows(q, do, shifted * LOG2_E, delta)


@triton.jit
def _dq_kernel(
    q_ptr,  # [T, H, D_QK]
    do_ptr,  # [T, H, D_V]
    gates_ptr, grad_gates_ptr,  # [T, H, 3]
    compressed_k, compressed_v,  # [C, H_KV, D]
    selected_k, selected_v, sliding_k, sliding_v,  # [T, H_KV, D]
    compressed_o_ptr, selected_o_ptr, sliding_o_ptr,  # [T, H, D_V]
    compressed_lse_ptr, selected_lse_ptr, sliding_lse_ptr,  # [T, H]
    compressed_first_ptr, compressed_end_ptr, window_first_ptr, window_end_ptr,  # [T]
    document_start_ptr,  # [T]
    start_ptr, mask_ptr,  # [tiles, H_KV, U]
    size_ptr,  # [tiles, H_KV]
    delta_ptr, shifted_ptr,  # float32 [3, T, H]
    dq_ptr,  # [T, H, D_QK]
    num_tokens, U, scale,
    HEADS: tl.constexpr, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dq of one tile and one KV head through all branches, and what the kernels of dk, dv need."""
    QUERIES: tl.constexpr = TILE.QUERIES
    ROWS: tl.constexpr = TILE.ROWS
    KEYS: tl.constexpr = TILE.KEYS
    BLOCK_QK: tl.constexpr = HEADS.BLOCK_QK
    compressed, compressed_runs = Keys(compressed_k, compressed_v), Runs(compressed_first_ptr, compressed_end_ptr)
    sliding, sliding_runs = Keys(sliding_k, sliding_v), Runs(window_first_ptr, window_end_ptr)
    written = Written(grad_gates_ptr, delta_ptr, shifted_ptr)
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    token, head, exists = tile_rows(tile * QUERIES, num_tokens, HEADS.GROUP, QUERIES, ROWS)
    rows = row_addresses(token, kv_head * HEADS.GROUP + head, HEADS.H)
    q = load_rows(q_ptr, rows, HEADS.D_QK, BLOCK_QK)
    do = load_rows(do_ptr, rows, HEADS.D_V, HEADS.BLOCK_V)
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([ROWS, BLOCK_QK], tl.float32)
    own = _fold_gate(q, do, Attention(compressed_o_ptr, compressed_lse_ptr), gates_ptr, written, rows, exists,
                     num_tokens, 0, HEADS)  # fmt: skip
    dq = add_runs_to_dq(dq, own, compressed, compressed_runs, token, kv_head, scale_log2, HEADS, KEYS, PRECISION)
    own = _fold_gate(q, do, Attention(sliding_o_ptr, sliding_lse_ptr), gates_ptr, written, rows, exists,
                     num_tokens, 2, HEADS)  # fmt: skip
    dq = add_runs_to_dq(dq, own, sliding, sliding_runs, token, kv_head, scale_log2, HEADS, KEYS, PRECISION)
    own = _fold_gate(q, do, Attention(selected_o_ptr, selected_lse_ptr), gates_ptr, written, rows, exists,
                     num_tokens, 1, HEADS)  # fmt: skip
    union = find_union(tile, kv_head, UnionTable(start_ptr, mask_ptr, size_ptr, U), HEADS.H_KV)
    queries = TileQueries(token, tile * QUERIES, tl.minimum(tile * QUERIES + QUERIES, num_tokens) - 1)
    dq = add_blocks_to_dq(dq, own, Keys(selected_k, selected_v), union, document_start_ptr, queries, kv_head,
                          scale_log2, HEADS, BLOCK_SIZE, KEYS, QUERIES * SLOTS, PRECISION)  # fmt: skip
    store_rows(dq_ptr, rows, exists, dq * scale, HEADS.D_QK, BLOCK_QK)


class Attended(NamedTuple):
    """What forward read and made."""

    q: Tensor  # [T, H, D_qk]
    gates: Tensor  # [T, H, 3]
    pairs: tuple[Tensor, ...]  # keys and values of the compressed, the selected and the sliding branch
    block_indices: Tensor  # int32 [T, H_kv, n]
    o: list[Tensor]  # of each branch, [T, H, D_v]
    lse: list[Tensor]  # of each branch, [T, H]


class QueryGradient(NamedTuple):
    """What is written: gradients, and what those of the keys and values are computed from."""

    dq: Tensor  # [T, H, D_qk]
    gates: Tensor  # [T, H, 3]
    delta: Tensor  # float32 [3, T, H]
    lse: Tensor  # float32 [3, T, H], with the gate folded in

    @classmethod
    def of(cls, q: Tensor, gates: Tensor) -> "QueryGradient":
        """Room for it."""
        delta, lse = (q.new_empty(3, *q.shape[:2], dtype=torch.float32) for _ in range(2))
        return cls(torch.empty_like(q), torch.empty_like(gates), delta, lse)


def launch_query_gradient(
    forward: Attended, do: Tensor, where: BatchLayout, block_size: int, scale: float, out: QueryGradient
) -> None:
    """`dispatch.query_gradient` in Triton."""
    q, gates, pairs, block_indices, o, lse = forward
    T, H_KV = len(q), pairs[1].shape[1]
    tile = union_tile("joint_dq", q, pairs[1], block_size)
    unions = unite(block_indices, where.document_start, block_size, tile.queries)
    _dq_kernel[(ceil_div(T, tile.queries), H_KV)](
        q, do, gates, out.gates, *(block_descriptor(x, tile.keys) for x in pairs), *o, *lse,
        *where.compressed_runs[:2], *where.sliding_runs[:2], where.document_start, *unions, out.delta, out.lse, out.dq,
        T, unions.start.shape[-1], scale,
        heads_of(q, pairs[1]), tile.sizes, block_size, block_indices.shape[2], dot_precision(q.dtype), **tile.options,
    )  # fmt: skip
