"""Stage 5: attend each query to the last w tokens (arXiv:2502.11089, sec. 3.3.3)."""
# T packed tokens, N documents, H query heads, H_kv key/value heads, D head dimension.
# t, s: positions in the document of a query and of a key.

from torch import Tensor

from nsa_kernels.reference.documents import documents
from nsa_kernels.reference.softmax import attend_query, stack_queries


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend each query to itself and the w - 1 tokens before it.

        o_t = Σ_s softmax_s(q_t · k_s · scale) v_s   over   t - w < s <= t

    Args:
        q: queries, [T, H, D_qk].
        k: keys, [T, H_kv, D_qk].
        v: values, [T, H_kv, D_v].
        cu_seqlens: document offsets, int32 [N + 1].
        window_size: tokens that a query sees (w), itself included.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        o [T, H, D_v] in q's dtype and lse [T, H], natural log, in float32 or q's dtype where that is wider.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, sec. 3.3.3.
    """
    rows = []
    for start, end in documents(cu_seqlens):
        for t in range(end - start):
            tokens = [start + s for s in range(end - start) if t - window_size < s <= t]
            rows.append(attend_query(q[start + t], k[tokens], v[tokens], scale))
    return stack_queries(rows)
