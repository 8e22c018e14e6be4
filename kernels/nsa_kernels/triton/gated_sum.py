"""Stages 4 and 5 and the gated sum of the branches, with one backward for all three.

    out = Σ_b g_b · o_b

The kernels of the backward take no gates below 0 (`query_gradient.py` says why): where the host can look at them at no
cost, the part of those that are is computed by itself.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels.backends import Stages, readable
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.block_attention import without_empty_slots
from nsa_kernels.triton.dispatch import block_attention, block_gradients, query_gradient, run_attention, run_gradients
from nsa_kernels.triton.query_gradient import Attended
from nsa_kernels.triton.run_attention import OtherBranches

# T packed tokens, H query heads, D_v head dim of the values. Branches: compressed, selected, sliding.


@torch.library.custom_op("nsa_kernels::gated_branches", mutates_args=())
def gated_branches(
    q: Tensor, k: Tensor, v: Tensor, sliding_k: Tensor, sliding_v: Tensor, compressed_k: Tensor, compressed_v: Tensor,
    gates: Tensor, block_indices: Tensor, compressed_o: Tensor, compressed_lse: Tensor,
    layout: list[Tensor], block_size: int, scale: float, stages: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`gated_sum`; returns out, selected_o, selected_lse, sliding_o and sliding_lse, of which out has a gradient."""
    where, names, pair = BatchLayout(*layout), Stages.read(stages), (sliding_k, sliding_v)
    selected_o, selected_lse = block_attention(
        names.selected_attention, q, k, v, block_indices, where.document_start, block_size, scale
    )
    others = OtherBranches(gates, compressed_o, selected_o, torch.empty_like(selected_o))
    sliding_o, sliding_lse = run_attention(
        names.sliding_attention, "sliding", q, *pair, where.sliding_runs, scale, others
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
    o: list[Tensor], lse: list[Tensor], layout: list[Tensor], block_size: int, scale: float, stages: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, sliding_k, sliding_v, compressed_k, compressed_v and gates.

    All but that of the gates are linear in the gates, and the kernels take none below 0: where some are, their part is
    computed by itself. On a GPU, where the host would have to wait to see one, its gradients are NaN.
    """
    pairs = (compressed_k, compressed_v, k, v, sliding_k, sliding_v)
    forward = Attended(q, gates, pairs, without_empty_slots(block_indices, k, block_size), o, lse)
    rest = BatchLayout(*layout), block_size, scale, Stages.read(stages)
    do = do.contiguous()
    if not readable(gates) or not bool((gates < 0).any()):
        return _branch_gradients(do, forward, *rest)
    *above, grad_gates = _branch_gradients(do, forward._replace(gates=gates.clamp(min=0)), *rest)
    *below, _ = _branch_gradients(do, forward._replace(gates=(-gates).clamp(min=0)), *rest)
    dq, dk, dv, *others = (a - b for a, b in zip(above, below, strict=True))
    sliding_dk, sliding_dv, compressed_dk, compressed_dv = others
    return dq, dk, dv, sliding_dk, sliding_dv, compressed_dk, compressed_dv, grad_gates


def _branch_gradients(
    do: Tensor, forward: Attended, where: BatchLayout, block_size: int, scale: float, names: Stages
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_gated_branches_backward` for gates that are not negative."""
    q, (compressed_k, compressed_v, k, v, sliding_k, sliding_v) = forward.q, forward.pairs
    dq, grad_gates, delta, shifted = query_gradient(names.query_gradient, forward, do, where, block_size, scale)
    grad_compressed = run_gradients(
        names.compressed_gradient, "compressed", q, compressed_k, compressed_v, do, shifted[0], delta[0],
        where.compressed_runs, scale,
    )  # fmt: skip
    grad_selected = block_gradients(
        names.selected_gradient, q, k, v, do, shifted[1], delta[1], forward.block_indices, where, block_size, scale
    )
    grad_sliding = run_gradients(
        names.sliding_gradient, "sliding", q, sliding_k, sliding_v, do, shifted[2], delta[2], where.sliding_runs, scale
    )
    return dq, *grad_selected, *grad_sliding, *grad_compressed, grad_gates


@_gated_branches_backward.register_fake
def _(do: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, sliding_k, sliding_v, compressed_k, compressed_v, gates = (torch.empty_like(x) for x in inputs[:8])
    return q, k, v, sliding_k, sliding_v, compressed_k, compressed_v, gates


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, compressed_o, compressed_lse, layout, ctx.block_size, ctx.scale, ctx.stages = inputs
    _, selected_o, selected_lse, sliding_o, sliding_lse = output
    saved_o, saved_lse = (compressed_o, selected_o, sliding_o), (compressed_lse, selected_lse, sliding_lse)
    ctx.save_for_backward(*tensors, *saved_o, *saved_lse, *layout)
    ctx.mark_non_differentiable(selected_o, selected_lse, sliding_o, sliding_lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, *_: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    tensors, o, lse, layout = saved[:9], list(saved[9:12]), list(saved[12:15]), list(saved[15:])
    rest = (None, None, None, [None] * len(layout), None, None, None)
    if do is None:
        return *(None for _ in range(8)), *rest
    return *_gated_branches_backward(do, *tensors, o, lse, layout, ctx.block_size, ctx.scale, ctx.stages), *rest


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
    scale: float,
    layout: BatchLayout,
    stages: Stages,
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
        scale: factor of the scores, positive.
        layout: `batch_layout` of the batch.
        stages: the implementations that a plan names.

    Returns:
        out [T, H, D_v] in q's dtype.
    """
    pairs = (x.contiguous() for x in (q, k, v, sliding_k, sliding_v, compressed_k, compressed_v))
    branch = (gates.contiguous(), block_indices.contiguous(), compressed_o, compressed_lse)
    block_size = config.within(q.shape[0]).select_block_size
    return gated_branches(*pairs, *branch, list(layout), block_size, scale, stages.spelled)[0]
