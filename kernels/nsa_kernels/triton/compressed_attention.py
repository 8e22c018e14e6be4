"""Stage 2: attend each query to the summaries of the blocks in its past (arXiv:2502.11089, eq. 5 and 7).

o[t] = Σ_i softmax_i(q[t] · k̃[i] · scale) ṽ[i]   over   i·d + l - 1 <= t

Its gradients are those of `gated_sum`.
"""

from typing import Any

import torch
from torch import Tensor

from nsa_kernels.backends import Stages
from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.dispatch import run_attention

# T packed tokens, C rows of compressed blocks, H query heads, H_kv KV heads, D_qk and D_v head dims.


@torch.library.custom_op("nsa_kernels::compressed_attention", mutates_args=())
def _compressed_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], scale: float, stages: str
) -> tuple[Tensor, Tensor]:
    runs = BatchLayout(*layout).compressed_runs
    return run_attention(Stages.read(stages).compressed_attention, "compressed", q, k, v, runs, scale)


@_compressed_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.no_grad()
def compressed_attention(
    q: Tensor, compressed_k: Tensor, compressed_v: Tensor, scale: float, layout: BatchLayout, stages: Stages
) -> tuple[Tensor, Tensor]:
    """Attend each query to the compression blocks that lie wholly in its past or present.

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        compressed_v: block values, [C, H_kv, D_v].
        scale: factor of the scores, positive.
        layout: `batch_layout` of the batch.
        stages: the implementations that a plan names.

    Returns:
        o [T, H, D_v] in q's dtype and lse float32 [T, H], natural log, both without gradient; 0 and 0 for a query that
        sees no block.

    Source: arXiv:2502.11089, eq. 5 and 7.
    """
    contiguous = q.contiguous(), compressed_k.contiguous(), compressed_v.contiguous()
    return _compressed_attention(*contiguous, list(layout), scale, stages.spelled)
