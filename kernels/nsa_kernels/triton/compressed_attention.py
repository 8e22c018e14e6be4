"""Stage 2: attend each query to the summaries of the blocks in its past (arXiv:2502.11089, eq. 5 and 7).

o[t] = Σ_i softmax_i(q[t] · k̃[i] · scale) ṽ[i]   over   i·d + l - 1 <= t
"""

from torch import Tensor

from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import BatchLayout, batch_layout
from nsa_kernels.triton.run_attention import define_op

# T packed tokens, C rows of compressed blocks, H query heads, H_kv KV heads, D_qk and D_v head dims.

_compressed_attention = define_op("compressed")


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
    layout: BatchLayout | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the compression blocks that lie wholly in its past or present.

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        compressed_v: block values, [C, H_kv, D_v].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        scale: factor of the scores, positive; 1 / sqrt(D_qk) by default.
        layout: `batch_layout` of the batch, made here if not given.

    Returns:
        o [T, H, D_v] in q's dtype and lse float32 [T, H], natural log, without gradient; 0 and 0 for a query that sees
        no block.

    Source: arXiv:2502.11089, eq. 5 and 7.
    """
    layout = batch_layout(cu_seqlens, len(q), config) if layout is None else layout
    return _compressed_attention(q, compressed_k, compressed_v, layout.compressed_runs, scale)
