"""The gated sum of the branches, and the backward of all three at once.

    out = Σ_b g_b · o_b

With do the gradient of out, branch b needs p · g_b · do for dv and p · (g_b · do · v - g_b · o_b · do) for dq and dk:
the gate only scales p. It is folded into the log-sum-exp, g · p = exp(s - (lse - ln g)), and then every branch reads
the same do, with delta_b = o_b · do, which is also the gradient of g_b. Gates are therefore not negative; a host that
need not wait for the numbers refuses those that are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton import block_attention, run_attention
from nsa_kernels.triton.block_attention import add_blocks_to_dq
from nsa_kernels.triton.block_lists import unite
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    block_descriptor,
    ceil_div,
    check_inputs,
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


@torch.library.custom_op("nsa_kernels::gated_branches", mutates_args=())
def gated_branches(
    q: Tensor, k: Tensor, v: Tensor, sliding_k: Tensor, sliding_v: Tensor, compressed_k: Tensor, compressed_v: Tensor,
    gates: Tensor, block_indices: Tensor, compressed_o: Tensor, compressed_lse: Tensor,
    layout: list[Tensor], block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`gated_sum`; returns out, selected_o, selected_lse, sliding_o and sliding_lse, of which out has a gradient."""
    where = BatchLayout(*layout)
    selected_o, selected_lse = block_attention.forward(
        q, k, v, block_indices, where.document_start, block_size, scale
    )  # fmt: skip
    others = run_attention.OtherBranches(gates, compressed_o, selected_o, torch.empty_like(selected_o))
    sliding_o, sliding_lse = run_attention.forward(
        q, sliding_k, sliding_v, where.sliding_runs, scale, "sliding", others
    )
    return others.out, selected_o, selected_lse, sliding_o, sliding_lse


@gated_branches.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    o = q.new_empty(*q.shape[:2], v.shape[-1])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    return o, torch.empty_like(o), lse, torch.empty_like(o), torch.empty_like(lse)


@torch.library.custom_op("nsa_kernels::gated_branches_backward", mutates_args=())
def _gated_branches_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sliding_k: Tensor, sliding_v: Tensor,
    compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, block_indices: Tensor,
    o: list[Tensor], lse: list[Tensor], layout: list[Tensor], block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, sliding_k, sliding_v, compressed_k, compressed_v and gates.

    All but that of the gates are linear in the gates, and the kernels take none below 0: where some are, their part is
    computed by itself. On a GPU, where the host would have to wait to see one, its gradients are NaN.
    """
    keys = k, v, sliding_k, sliding_v, compressed_k, compressed_v
    rest = block_indices, o, lse, layout, block_size, scale
    if gates.is_cuda or not bool((gates < 0).any()):
        return _branch_gradients(do, q, *keys, gates, *rest)
    *above, grad_gates = _branch_gradients(do, q, *keys, gates.clamp(min=0), *rest)
    *below, _ = _branch_gradients(do, q, *keys, (-gates).clamp(min=0), *rest)
    dq, dk, dv, *others = (a - b for a, b in zip(above, below, strict=True))
    sliding_dk, sliding_dv, compressed_dk, compressed_dv = others
    return dq, dk, dv, sliding_dk, sliding_dv, compressed_dk, compressed_dv, grad_gates


def _branch_gradients(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, sliding_k: Tensor, sliding_v: Tensor,
    compressed_k: Tensor, compressed_v: Tensor, gates: Tensor, block_indices: Tensor,
    o: list[Tensor], lse: list[Tensor], layout: list[Tensor], block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_gated_branches_backward` for gates that are not negative."""
    where, do = BatchLayout(*layout), do.contiguous()
    block_indices = block_attention.without_empty_slots(block_indices, k, block_size)
    (T, H, D_QK), (_, H_KV, D_V) = q.shape, v.shape
    delta, lse_shifted = (q.new_empty(3, T, H, dtype=torch.float32) for _ in range(2))
    grad_gates, dq = torch.empty_like(gates), torch.empty_like(q)
    pairs = (compressed_k, compressed_v, k, v, sliding_k, sliding_v)
    if block_attention.tiles_fit_hopper(q, v, block_size):
        from nsa_kernels.hopper import gated_sum as gated_sum_hopper

        unions = unite(block_indices, where.document_start, block_size, block_attention.HOPPER_ROWS * H_KV // H)
        gated_sum_hopper.backward_q(
            q, do, gates, pairs, o, lse, where, unions, block_size, scale, grad_gates, delta, lse_shifted, dq
        )
    else:
        tile = block_attention.union_tile("joint_dq", q, v, block_size)
        unions = unite(block_indices, where.document_start, block_size, tile.queries)
        _dq_kernel[(ceil_div(T, tile.queries), H_KV)](
            q, do, gates, grad_gates, *(block_descriptor(x, tile.keys) for x in pairs), *o, *lse,
            *where.compressed_runs[:2], *where.sliding_runs[:2], where.document_start, *unions, delta, lse_shifted, dq,
            T, unions.start.shape[-1], scale,
            H_KV, H // H_KV, D_QK, D_V, padded(D_QK), padded(D_V), tile.queries, tile.rows, tile.keys, block_size,
            block_indices.shape[2], dot_precision(q.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    grad_compressed = run_attention.backward_kv(
        q, compressed_k, compressed_v, do, lse_shifted[0], delta[0], where.compressed_runs, scale, "compressed"
    )
    grad_selected = block_attention.backward_kv(
        q, k, v, do, lse_shifted[1], delta[1], block_indices,
        where.first_block, where.block_start, where.block_end, block_size, scale,
    )  # fmt: skip
    grad_sliding = run_attention.backward_kv(
        q, sliding_k, sliding_v, do, lse_shifted[2], delta[2], where.sliding_runs, scale, "sliding"
    )
    return dq, *grad_selected, *grad_sliding, *grad_compressed, grad_gates


@_gated_branches_backward.register_fake
def _(do: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sliding_k, sliding_v, compressed_k, compressed_v, gates = (torch.empty_like(x) for x in inputs[:8])
    return q, k, v, sliding_k, sliding_v, compressed_k, compressed_v, gates


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, compressed_o, compressed_lse, layout, ctx.block_size, ctx.scale = inputs
    _, selected_o, selected_lse, sliding_o, sliding_lse = output
    saved_o, saved_lse = (compressed_o, selected_o, sliding_o), (compressed_lse, selected_lse, sliding_lse)
    ctx.save_for_backward(*tensors, *saved_o, *saved_lse, *layout)
    ctx.mark_non_differentiable(selected_o, selected_lse, sliding_o, sliding_lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, o, lse, layout = saved[:9], list(saved[9:12]), list(saved[12:15]), list(saved[15:])
    rest = (None, None, None, [None] * len(layout), None, None)
    if do is None:
        return *(None for _ in range(8)), *rest
    return *_gated_branches_backward(do, *tensors, o, lse, layout, ctx.block_size, ctx.scale), *rest


gated_branches.register_autograd(_gradients, setup_context=_save)


def gated_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sliding_k: Tensor,
    sliding_v: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    gates: Tensor,
    block_indices: Tensor,
    compressed_o: Tensor,
    compressed_lse: Tensor,
    config: NSAConfig,
    scale: float | None,
    layout: BatchLayout,
) -> Tensor:
    """Attend through the selected and the sliding branch and sum all three by their gates.

    The compressed branch comes finished, since the selection needs it first: `compressed_o` and `compressed_lse` of
    the same q, compressed_k and compressed_v, without a graph of their own. Gradients reach q, all keys and values and
    the gates from here.

    Args:
        q: queries, [T, H, D_qk].
        k: keys of the selected branch, [T, H_kv, D_qk].
        v: values of the selected branch, [T, H_kv, D_v].
        sliding_k: keys of the sliding branch, [T, H_kv, D_qk].
        sliding_v: values of the sliding branch, [T, H_kv, D_v].
        compressed_k: block keys, [C, H_kv, D_qk].
        compressed_v: block values, [C, H_kv, D_v].
        gates: weights of the compressed, selected and sliding branch, [T, H, 3].
        block_indices: int32 [T, H_kv, n].
        compressed_o: output of the compressed branch, [T, H, D_v].
        compressed_lse: its log-sum-exp, float32 [T, H].
        config: block sizes.
        scale: factor of the scores, positive; 1 / sqrt(D_qk) if None.
        layout: `batch_layout` of the batch.

    Returns:
        out [T, H, D_v] in q's dtype.
    """
    for keys, values in ((k, v), (sliding_k, sliding_v), (compressed_k, compressed_v)):
        factor = check_inputs(q, keys, values, scale)
    pairs = (x.contiguous() for x in (q, k, v, sliding_k, sliding_v, compressed_k, compressed_v))
    branch = (gates.contiguous(), block_indices.contiguous(), compressed_o, compressed_lse)
    return gated_branches(*pairs, *branch, list(layout), config.within(q.shape[0]).select_block_size, factor)[0]
