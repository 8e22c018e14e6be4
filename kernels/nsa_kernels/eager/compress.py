"""Stage 1: summarise each block of keys or values in one (arXiv:2502.11089, eq. 7)."""

import torch
from torch import Tensor

from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.packing import compressed_layout
from nsa_kernels.precision import linear_map

# T packed tokens, H_kv KV heads, D head dim, C rows of compressed blocks, l tokens in one of them.


def compress(x: Tensor, cu_seqlens: Tensor, config: NSAConfig, weights: CompressionWeights | None = None) -> Tensor:
    """Summarise each block of keys or values: φ(x) = mean(x) + f(x + e), x [T, H_kv, D] -> [C, H_kv, D].

    See `reference.compress`. Rows past the last block are zero.
    """
    config = config if weights is not None else config.within(len(x))
    layout = compressed_layout(cu_seqlens, len(x), config)
    tokens = layout.start[:, None] + torch.arange(config.compress_block_size, device=x.device)  # [C, l]
    tokens = tokens.where(layout.is_block[:, None], 0)
    blocks = x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:])  # [C, l, H_kv, D]
    return summarise(blocks, weights).where(layout.is_block[:, None, None], 0.0)


def summarise(blocks: Tensor, weights: CompressionWeights | None = None) -> Tensor:
    """φ of blocks of keys or values that are gathered already, [C, l, H_kv, D] -> [C, H_kv, D]."""
    summary = blocks.mean(1, dtype=torch.promote_types(blocks.dtype, torch.float32))  # [C, H_kv, D]
    if weights is not None:
        inputs = blocks.permute(2, 0, 1, 3) + weights.position_embedding.unsqueeze(1)  # [H_kv, C, l, D]
        mapped = linear_map(inputs.flatten(2), weights.in_weight) + weights.in_bias.unsqueeze(1)
        if weights.out_weight is not None and weights.out_bias is not None:
            mapped = linear_map(mapped, weights.out_weight, activated=True) + weights.out_bias.unsqueeze(1)
        summary = summary + mapped.transpose(0, 1)
    return summary.to(blocks.dtype)
