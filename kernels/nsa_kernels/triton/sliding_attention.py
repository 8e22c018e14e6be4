"""Stage 5: attend each query to the last w tokens (arXiv:2502.11089, sec. 3.3.3).

o[t] = Σ_s softmax_s(q[t] · k[s] · scale) v[s]   over   t - w < s <= t
"""

from torch import Tensor

from nsa_kernels.packing import document_index, sliding_runs
from nsa_kernels.triton.run_attention import define_op

# T packed tokens, H query heads, H_kv KV heads, D_qk and D_v head dims.

_sliding_attention = define_op("sliding")


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend each query to itself and the w - 1 tokens of its document before it.

    Args:
        q: queries, [T, H, D_qk].
        k: keys, [T, H_kv, D_qk].
        v: values, [T, H_kv, D_v].
        cu_seqlens: document offsets, int32 [N + 1].
        window_size: tokens that a query sees (w), itself included.
        scale: factor of the scores, positive; 1 / sqrt(D_qk) by default.

    Returns:
        o [T, H, D_v] in q's dtype and lse float32 [T, H], natural log, without gradient.

    Source: arXiv:2502.11089, sec. 3.3.3.
    """
    document, offsets = document_index(cu_seqlens, len(q)), cu_seqlens.int()
    return _sliding_attention(q, k, v, sliding_runs(offsets[document], offsets[document + 1], window_size), scale)
