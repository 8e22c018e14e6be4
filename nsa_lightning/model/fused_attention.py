"""Causal attention through PyTorch's own fused kernels, of packed documents or the last tokens of one.

The dense `full` and `sliding` layers.
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from nsa_kernels import eager
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_VARLEN_DTYPES = (torch.bfloat16, torch.float16)
_VARLEN_HAS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.12 or newer

MASKED_QUERIES = 1024
"""Queries under one mask at most, so that it stays small beside the keys."""

# T packed or new tokens, N documents, H query heads, H_kv KV heads, D_qk and D_v head dims, L tokens of one document.


def packed_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, window_size: int | None = None
) -> Tensor:
    """Attend each query to the tokens of its own document up to itself.

    On CUDA in bf16 or fp16 this is one call of `varlen_attn`. Elsewhere the documents are taken one by one, which
    reads `cu_seqlens` on the host. On a CPU infinity and NaN reach no token before theirs; PyTorch's kernels multiply
    them by the weight of 0 that an earlier token gives them, so that within a document all would be NaN.

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
    if _takes_varlen(q, v):
        return _varlen(q, k, v, (cu_seqlens, cu_seqlens), (max_seqlen, max_seqlen), window_size)
    if not q.is_cuda and q.device.type == "cpu" and not all(bool(x.sum().isfinite()) for x in (q, k, v)):
        return eager.sliding_attention(q, k, v, cu_seqlens, window_size or len(q))[0]
    lengths = cu_seqlens.diff().tolist()
    documents = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_document_attention(*document, window_size) for document in documents])


def chunk_causal_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int | None = None) -> Tensor:
    """Attend the last T tokens of one document to all of it, each to the tokens up to itself.

    Args:
        q: queries of the last T tokens, [T, H, D_qk].
        k: keys of all L tokens, [L, H_kv, D_qk]; with a window of the last T + window_size - 1 at least.
        v: values, [L, H_kv, D_v].
        window_size: attend to the last `window_size` tokens only, the query's own included.

    Returns:
        [T, H, D_v].
    """
    if _takes_varlen(q, v):
        lengths = (len(q), len(k))
        ends = torch.arange(2, dtype=torch.int32, device=q.device)  # times a length: [0, length], made on the device
        return _varlen(q, k, v, (ends * lengths[0], ends * lengths[1]), lengths, window_size)
    return _document_attention(q, k, v, window_size)


def _takes_varlen(q: Tensor, v: Tensor) -> bool:
    head_dim = q.shape[-1]
    return q.is_cuda and q.dtype in _VARLEN_DTYPES and head_dim == v.shape[-1] and head_dim % 8 == 0 and head_dim <= 256


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    window_size: int | None,
) -> Tensor:
    """One call for all documents; where queries are fewer than keys they are the last ones."""
    window = (-1 if window_size is None or window_size >= longest[1] else window_size - 1, 0)
    options: dict[str, Any] = {"enable_gqa": True} if _VARLEN_HAS_GQA else {}
    if not _VARLEN_HAS_GQA:
        group_size = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
    return cast("Tensor", varlen_attn(q, k, v, *offsets, *longest, window_size=window, **options))


def _document_attention(q: Tensor, k: Tensor, v: Tensor, window_size: int | None) -> Tensor:
    """Causal attention of the last T of a document's L tokens, q [T, H, D_qk] -> [T, H, D_v]."""
    num_queries, length = len(q), len(k)
    past, window = length - num_queries, length if window_size is None else min(window_size, length)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, T or L, D]
    if window == length == num_queries:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.squeeze(0).transpose(0, 1)
    parts, step = [], min(window, MASKED_QUERIES)
    for start in range(past, length, step):  # queries of one window see keys of at most two
        stop, first = min(start + step, length), max(start - window + 1, 0)
        query = torch.arange(start, stop, device=q.device)[:, None]
        key = torch.arange(first, stop, device=q.device)
        mask = (key <= query) & (key > query - window)
        queries = q[:, :, start - past : stop - past]
        parts.append(
            F.scaled_dot_product_attention(
                queries, k[:, :, first:stop], v[:, :, first:stop], attn_mask=mask, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2).squeeze(0).transpose(0, 1)
