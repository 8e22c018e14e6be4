"""Stage 4: attend each query to the tokens of its chosen blocks (arXiv:2502.11089, eq. 5 and 12)."""

import torch
from torch import Tensor

from nsa_kernels.eager.chunks import BlocksInChunks, ChunkedAttention, chunk_size, default_scale
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import document_index, document_positions, selection_layout

# T packed tokens, H query heads, H_kv KV heads, D head dim, B selection blocks, n selected ones of l' tokens each.


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the tokens of its selected blocks; see `reference.selected_attention`."""
    (num_tokens, num_kv_heads), config = k.shape[:2], config.within(len(k))
    size, slots = config.select_block_size, -(-num_tokens // config.select_block_size)
    layout = selection_layout(cu_seqlens, num_tokens, config)
    tokens = (layout.start[:, None] + torch.arange(size, device=q.device)).clamp(max=num_tokens - 1)  # [B, l']

    def as_blocks(x: Tensor) -> Tensor:  # [T, H_kv, D] -> [H_kv * B, l', D]
        return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).permute(2, 0, 1, 3).flatten(0, 1)

    position = document_positions(cu_seqlens, num_tokens)[:, None, None]
    chosen = block_indices[..., :slots].long()
    first = layout.cu_blocks[document_index(cu_seqlens, num_tokens)][:, None, None]
    head_rows = torch.arange(num_kv_heads, device=q.device)[:, None] * len(layout.block)
    rows = (first + chosen.clamp(min=0)) + head_rows  # [T, H_kv, n]
    visible = (position + 1 - chosen * size).clamp(max=size).where(chosen >= 0, 0)
    bytes_per_query = 4 * num_kv_heads * chosen.shape[-1] * size * max(q.shape[-1], q.shape[1] // num_kv_heads)
    blocks = BlocksInChunks(rows, visible, size, chunk_size(q.device, bytes_per_query))
    return ChunkedAttention.apply(q, as_blocks(k), as_blocks(v), num_kv_heads, default_scale(q, scale), blocks)
