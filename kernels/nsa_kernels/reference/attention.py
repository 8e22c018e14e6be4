"""Native Sparse Attention as its definition: the stages in order, and the sum of the branches through their gates."""
# T packed tokens, N documents, H query heads, H_kv key/value heads, G = H / H_kv heads in a group, D head dimension,
# C rows for compressed blocks.

import torch
from torch import Tensor

from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput
from nsa_kernels.reference.block_selection import block_selection
from nsa_kernels.reference.compress import compress
from nsa_kernels.reference.compressed_attention import compressed_attention
from nsa_kernels.reference.selected_attention import selected_attention
from nsa_kernels.reference.sliding_attention import sliding_attention
from nsa_kernels.rotary import apply_rotary


@torch.compiler.disable  # type: ignore[untyped-decorator]  # tokens and documents are plain Python loops
def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    *,
    sliding_k: Tensor | None = None,
    sliding_v: Tensor | None = None,
    compress_k: Tensor | None = None,
    compress_v: Tensor | None = None,
    k_weights: CompressionWeights | None = None,
    v_weights: CompressionWeights | None = None,
    compressed_rotary: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    scale: float | None = None,
) -> NSAOutput:
    """Sum the compressed, the selected and the sliding branch, each through its gate.

        out[t] = g_cmp[t] * o_cmp[t] + g_slc[t] * o_slc[t] + g_win[t] * o_win[t]

    Args:
        q: queries, [T, H, D_qk]; head h belongs to KV head h // G.
        k: keys of the selected branch, [T, H_kv, D_qk].
        v: values of the selected branch, [T, H_kv, D_v].
        gates: weights in (0, 1) of the compressed, selected and sliding branch, [T, H, 3].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes, counts and window.
        sliding_k: keys of the sliding branch, [T, H_kv, D_qk]; `k` by default.
        sliding_v: values of the sliding branch, [T, H_kv, D_v]; `v` by default.
        compress_k: keys to compress, [T, H_kv, D_qk]; `k` by default.
        compress_v: values to compress, [T, H_kv, D_v]; `v` by default.
        k_weights: φ of the keys; None for the mean.
        v_weights: φ of the values; None for the mean.
        compressed_rotary: (cos, sin), each [C, R/2], the angles at which the compressed keys are rotated, one row a
            block; None for no rotation.
        block_indices: int32 [T, H_kv, n], attended to instead of the blocks that ranking would choose.
        scale: factor of the scores of every branch, 1 / sqrt(D_qk) by default.

    Returns:
        out [T, H, D_v] in q's dtype, and the block indices that the selected branch attended to.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 5.
    """
    sliding_k, sliding_v = k if sliding_k is None else sliding_k, v if sliding_v is None else sliding_v
    compress_k, compress_v = k if compress_k is None else compress_k, v if compress_v is None else compress_v

    compressed_k = compress(compress_k, cu_seqlens, config, k_weights)  # [C, H_kv, D_qk]
    compressed_v = compress(compress_v, cu_seqlens, config, v_weights)  # [C, H_kv, D_v]
    if compressed_rotary is not None:
        compressed_k = apply_rotary(compressed_k, *compressed_rotary)

    compressed, lse = compressed_attention(q, compressed_k, compressed_v, cu_seqlens, config, scale)
    if block_indices is None:
        block_indices = block_selection(q, compressed_k, lse, cu_seqlens, config, scale)
    selected, _ = selected_attention(q, k, v, block_indices, cu_seqlens, config, scale)
    sliding, _ = sliding_attention(q, sliding_k, sliding_v, cu_seqlens, config.window_size, scale)

    g_cmp, g_slc, g_win = gates.to(q.dtype).unsqueeze(-1).unbind(2)  # each [T, H, 1]
    return NSAOutput(g_cmp * compressed + g_slc * selected + g_win * sliding, block_indices)
