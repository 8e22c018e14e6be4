"""The gradient of the queries through all branches at once, and that of the gates.

With do the gradient of the gated sum, branch b needs p · g_b · do for dv and p · (g_b · do · v - g_b · o_b · do) for dq
and dk: the gate only scales p. It is folded into the log-sum-exp, g · p = exp(s - (lse - ln g)), and then every branch
reads the same do, with delta_b = o_b · do, which is also the gradient of g_b. Gates are therefore not negative.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.block_attention import add_blocks_to_dq, union_tile
from nsa_kernels.triton.block_lists import unite
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    block_descriptor,
    ceil_div,
    dot_precision,
    load_rows,
    padded,
    row_addresses,
    store_rows,
    tile_rows,
    wide,
)
from nsa_kernels.triton.run_attention import add_runs_to_dq

# T packed tokens, H query heads, D_v head dim of the values. Branches: compressed, selected, sliding.


@triton.jit
def _fold_gate(
    gates_ptr, grad_gates_ptr, o_ptr, do, lse_ptr, delta_ptr, shifted_ptr, rows, exists,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = o · do, the gate's gradient, and lse - ln(gate) of a branch; a gate of 0 shifts so far that p is 0.

    A negative gate has no logarithm: p and all gradients through it would be NaN, which no run takes for a result.
    """
    delta = tl.sum(load_rows(o_ptr, rows, D, BLOCK_D).to(tl.float32) * do.to(tl.float32), 1)
    gate = tl.load(gates_ptr + 3 * rows).to(tl.float32)
    shifted = tl.where(gate == 0, -HIDDEN, tl.load(lse_ptr + rows) - tl.log(gate))
    tl.store(delta_ptr + rows, delta, mask=exists)
    tl.store(shifted_ptr + rows, shifted, mask=exists)
    tl.store(grad_gates_ptr + 3 * rows, delta.to(grad_gates_ptr.dtype.element_ty), mask=exists)
    return shifted * LOG2_E, delta


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
    H_KV: tl.constexpr, GROUP: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SLOTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes dq of one tile and one KV head through all branches, and what the kernels of dk, dv need."""
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    token, head, exists = tile_rows(tile * QUERIES, num_tokens, GROUP, QUERIES, ROWS)
    rows = row_addresses(token, kv_head * GROUP + head, H_KV * GROUP)
    q, do = load_rows(q_ptr, rows, D_QK, BLOCK_QK), load_rows(do_ptr, rows, D_V, BLOCK_V)
    scale_log2 = scale * LOG2_E
    branch = wide(num_tokens) * H_KV * GROUP
    dq = tl.zeros([ROWS, BLOCK_QK], tl.float32)
    lse, delta = _fold_gate(gates_ptr, grad_gates_ptr, compressed_o_ptr, do, compressed_lse_ptr,
                            delta_ptr, shifted_ptr, rows, exists, D_V, BLOCK_V)  # fmt: skip
    dq = add_runs_to_dq(dq, q, do, lse, delta, compressed_k, compressed_v, compressed_first_ptr, compressed_end_ptr,
                        token, kv_head, scale_log2, BLOCK_QK, BLOCK_V, KEYS, PRECISION)  # fmt: skip
    lse, delta = _fold_gate(gates_ptr + 2, grad_gates_ptr + 2, sliding_o_ptr, do, sliding_lse_ptr,
                            delta_ptr + 2 * branch, shifted_ptr + 2 * branch, rows, exists, D_V, BLOCK_V)  # fmt: skip
    dq = add_runs_to_dq(dq, q, do, lse, delta, sliding_k, sliding_v, window_first_ptr, window_end_ptr,
                        token, kv_head, scale_log2, BLOCK_QK, BLOCK_V, KEYS, PRECISION)  # fmt: skip
    lse, delta = _fold_gate(gates_ptr + 1, grad_gates_ptr + 1, selected_o_ptr, do, selected_lse_ptr,
                            delta_ptr + branch, shifted_ptr + branch, rows, exists, D_V, BLOCK_V)  # fmt: skip
    union = (tile.to(tl.int64) * H_KV + kv_head) * U
    size = tl.load(size_ptr + tile * H_KV + kv_head)
    dq = add_blocks_to_dq(dq, q, do, lse, delta, selected_k, selected_v, document_start_ptr, start_ptr + union,
                          mask_ptr + union, size, token, tile * QUERIES,
                          tl.minimum(tile * QUERIES + QUERIES, num_tokens) - 1, kv_head, scale_log2,
                          BLOCK_QK, BLOCK_V, BLOCK_SIZE, KEYS, QUERIES * SLOTS, PRECISION)  # fmt: skip
    store_rows(dq_ptr, rows, exists, dq * scale, D_QK, BLOCK_QK)


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
    (T, H, D_QK), (_, H_KV, D_V) = q.shape, pairs[1].shape
    tile = union_tile("joint_dq", q, pairs[1], block_size)
    unions = unite(block_indices, where.document_start, block_size, tile.queries)
    _dq_kernel[(ceil_div(T, tile.queries), H_KV)](
        q, do, gates, out.gates, *(block_descriptor(x, tile.keys) for x in pairs), *o, *lse,
        *where.compressed_runs[:2], *where.sliding_runs[:2], where.document_start, *unions, out.delta, out.lse, out.dq,
        T, unions.start.shape[-1], scale,
        H_KV, H // H_KV, D_QK, D_V, padded(D_QK), padded(D_V), tile.queries, tile.rows, tile.keys, block_size,
        block_indices.shape[2], dot_precision(q.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
