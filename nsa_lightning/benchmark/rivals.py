"""What NSA is compared with: PyTorch's own full causal attention, through its flash and its cuDNN kernels.

One document goes through `scaled_dot_product_attention` with the backend pinned. Packed documents go through
`varlen_attn` (flash); PyTorch has no such call for cuDNN (jagged tensors reach it without grouped heads only, behind a
switch), so there equally long documents are a batch, and others are taken one after another.
"""

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

Rival = Literal["flash", "cudnn"]
RIVALS: tuple[Rival, ...] = get_args(Rival)

# T packed tokens, N documents, B sequences, H query heads, H_kv KV heads, D_qk and D_v head dims, L tokens of one
# document or sequence.

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [T, H, D_qk], k [T, H_kv, D_qk], v [T, H_kv, D_v] -> [T, H, D_v]."""

_BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
_VARLEN_OPTIONS: dict[str, Any] = (  # before torch 2.12 it takes fewer KV heads without being told
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
)


def full_attention(rival: Rival, lengths: list[int], cu_seqlens: Tensor) -> Attention:
    """Full causal attention of each document.

    Args:
        rival: whose kernels.
        lengths: tokens of each document, none of them 0.
        cu_seqlens: the documents' offsets, int32 [N + 1].

    Returns:
        A function that raises whatever PyTorch raises where its kernels do not support the shapes or the device.
    """
    if len(set(lengths)) == 1 and (rival == "cudnn" or len(lengths) == 1):
        return lambda q, k, v: _batched(_BACKENDS[rival], len(lengths), q, k, v)
    if rival == "flash":
        return lambda q, k, v: _varlen(q, k, v, cu_seqlens, max(lengths))
    return lambda q, k, v: _one_by_one(_BACKENDS[rival], lengths, q, k, v)


def _batched(backend: SDPBackend, num_documents: int, *tensors: Tensor) -> Tensor:
    q, k, v = (x.unflatten(0, (num_documents, -1)).transpose(1, 2) for x in tensors)  # [N, heads, L, D]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **_VARLEN_OPTIONS)
    return cast("Tensor", out)


def _one_by_one(backend: SDPBackend, lengths: list[int], *tensors: Tensor) -> Tensor:
    documents = zip(*(x.split(lengths) for x in tensors), strict=True)
    return torch.cat([_batched(backend, 1, *document) for document in documents])


def pinned(rival: Rival) -> AbstractContextManager[None]:
    """Within it `scaled_dot_product_attention` runs the rival's kernels, or fails."""
    return sdpa_kernel(_BACKENDS[rival])


def attend_one_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of one new token of each sequence, with the kernels that are pinned.

    Args:
        q: [B, H, D_qk].
        k: keys of all tokens, [B, H_kv, L, D_qk].
        v: [B, H_kv, L, D_v].

    Returns:
        [B, H, D_v].
    """
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)
