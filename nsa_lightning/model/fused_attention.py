"""Causal attention over packed documents through PyTorch's own fused kernels: the dense `full` and `sliding` layers."""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 or newer

# T packed tokens, N documents, H query heads, H_kv KV heads, D_qk and D_v head dims, L tokens of one document.


def packed_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window_size: int | None = None
) -> Tensor:
    """Attend each query to the tokens of its own document up to itself.

    On CUDA in bf16 or fp16 this is one call of `varlen_attn`. Elsewhere the documents are taken one by one, which
    reads `cu_seqlens` on the host.

    Args:
        q: [T, H, D_qk].
        k: [T, H_kv, D_qk].
        v: [T, H_kv, D_v].
        cu_seqlens: int32 [N + 1].
        max_seqlen: an upper bound on the longest document.
        window_size: attend to the last `window_size` tokens only, the query's own included.

    Returns:
        [T, H, D_v].
    """
    head_dim = q.shape[-1]
    if q.is_cuda and q.dtype in _VARLEN_DTYPES and head_dim == v.shape[-1] and head_dim % 8 == 0 and head_dim <= 256:
        window = (-1 if window_size is None else window_size - 1, 0)
        options: dict[str, Any] = {"enable_gqa": True} if _VARLEN_HAS_GQA else {}
        if not _VARLEN_HAS_GQA:
            group_size = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=window, **options)
        return cast("Tensor", out)
    lengths = cu_seqlens.diff().tolist()
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_document_attention(*document, window_size) for document in documents])


def _document_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int | None) -> Tensor:
    """Causal attention of one document, q [L, H, D_qk] -> [L, H, D_v]."""
    length = len(q)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, L, D]
    if window_size is None or window_size >= length:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)
    parts = []
    for start in range(0, length, window_size):  # queries of one window see keys of at most two
        stop, first = min(start + window_size, length), max(start - window_size + 1, 0)
        query = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(first, stop, device=q.device)
        mask = (key <= query) & (key > query - window_size)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], attn_mask=mask, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)
