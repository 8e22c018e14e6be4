"""Stage 2: attend each query to the summaries of the blocks in its past (arXiv:2502.11089, eq. 5 and 7)."""
# T packed tokens, N documents, H query heads, H_kv key/value heads, D head dimension, C rows for compressed blocks.
# t: position of a query in its document; i compression block.

from torch import Tensor

from nsa_kernels.geometry import NSAConfig
from nsa_kernels.reference.documents import documents_with_blocks, visible_blocks
from nsa_kernels.reference.softmax import attend_query, stack_queries


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the compression blocks that lie wholly in its past or present.

        o_t = Σ_i softmax_i(q_t · k̃_i · scale) ṽ_i   over   i·d + l - 1 <= t

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        compressed_v: block values, [C, H_kv, D_v].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        o [T, H, D_v] in q's dtype and lse [T, H], natural log, in float32 or q's dtype where that is wider. A query
        that sees no block has o = 0 and lse = 0, and passes no gradient on.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 5 and 7.
    """
    rows = []
    for start, end, first_block in documents_with_blocks(cu_seqlens, config):
        for t in range(end - start):
            visible = [first_block + i for i in visible_blocks(t, end - start, config)]
            rows.append(attend_query(q[start + t], compressed_k[visible], compressed_v[visible], scale))
    return stack_queries(rows)
