"""Stage 4: attend each query to the tokens of its chosen blocks (arXiv:2502.11089, eq. 5 and 12).

o[t] = Σ_s softmax_s(q[t] · k[s] · scale) v[s]   over   s // l' in block_indices[t], s <= t
"""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import BatchLayout, batch_layout
from nsa_kernels.triton.block_attention import backward_kv, backward_q, forward
from nsa_kernels.triton.primitives import check_inputs, row_sums

# T packed tokens, H query heads, H_kv KV heads, D_qk and D_v head dims, n selected blocks.


@torch.library.custom_op("nsa_kernels::selected_attention", mutates_args=())
def _selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, layout: list[Tensor], block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, block_indices, BatchLayout(*layout).document_start, block_size, scale)


@_selected_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("nsa_kernels::selected_attention_backward", mutates_args=())
def _selected_attention_backward(
    do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    layout: list[Tensor], block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    where, do = BatchLayout(*layout), do.contiguous()
    known = (q, k, v, do, lse, row_sums(o, do), block_indices)
    dq = backward_q(*known, where.document_start, block_size, scale)
    return dq, *backward_kv(*known, where.first_block, where.block_start, where.block_end, block_size, scale)


@_selected_attention_backward.register_fake
def _(do: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, layout, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*output, *tensors, *layout)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, do: Tensor | None, _: Any) -> tuple[Any, ...]:
    tensors, layout = ctx.saved_tensors[:6], list(ctx.saved_tensors[6:])
    rest = (None, [None] * len(layout), None, None)
    if do is None:
        return None, None, None, *rest
    return *_selected_attention_backward(do, *tensors, layout, ctx.block_size, ctx.scale), *rest


_selected_attention.register_autograd(_gradients, setup_context=_save)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
    layout: BatchLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the tokens of its chosen blocks, up to and including itself.

    Args:
        q: queries, [T, H, D_qk].
        k: keys, [T, H_kv, D_qk].
        v: values, [T, H_kv, D_v].
        block_indices: int32 [T, H_kv, n], ascending, then -1 for none; relative to the query's document, none twice.
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        scale: factor of the scores, positive; 1 / sqrt(D_qk) by default.
        layout: `batch_layout` of the batch, made here if not given.

    Returns:
        o [T, H, D_v] in q's dtype and lse float32 [T, H], natural log, without gradient.

    Source: arXiv:2502.11089, eq. 5 and 12.
    """
    layout = batch_layout(cu_seqlens, len(q), config) if layout is None else layout
    scale, config = check_inputs(q, k, v, scale), config.within(q.shape[0])
    tensors = q.contiguous(), k.contiguous(), v.contiguous(), block_indices.contiguous()
    return _selected_attention(*tensors, list(layout), config.select_block_size, scale)
