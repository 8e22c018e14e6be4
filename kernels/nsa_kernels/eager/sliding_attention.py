"""Stage 5: attend each query to the last w tokens (arXiv:2502.11089, sec. 3.3.3)."""

import torch
from torch import Tensor

from nsa_kernels.eager.chunks import ChunkedAttention, RunsInChunks, chunk_size, default_scale
from nsa_kernels.packing import document_index

# T packed tokens, H query heads, H_kv KV heads, D_qk and D_v head dims.


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend each query to the last `window_size` tokens, its own included; see `reference.sliding_attention`."""
    num_tokens = len(q)
    token = torch.arange(num_tokens, device=q.device)
    document_start = cu_seqlens.long()[document_index(cu_seqlens, num_tokens)]
    first = torch.maximum(token - window_size + 1, document_start)
    bytes_per_query = 4 * q.shape[1] * min(2 * window_size, num_tokens)
    chunk = min(chunk_size(q.device, bytes_per_query), max(window_size, 16))
    chunks = []
    for start in range(0, num_tokens, chunk):
        queries = slice(start, min(start + chunk, num_tokens))
        chunks.append((queries, slice(max(start - window_size + 1, 0), queries.stop)))
    runs = RunsInChunks(first, token + 1, chunks)
    return ChunkedAttention.apply(q, k, v, k.shape[1], default_scale(q, scale), runs)
