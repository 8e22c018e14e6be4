"""Stage 1: summarise each block of keys or values in one, block by block (arXiv:2502.11089, eq. 7)."""
# T packed tokens, N documents, H_kv key/value heads, D head dimension, C rows for compressed blocks.
# i: compression block in its document.
# ruff: noqa: E741 - l is the paper's letter for the tokens of a compression block

import torch
from torch import Tensor
from torch.nn.functional import silu

from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.precision import contract
from nsa_kernels.reference.documents import documents, num_compressed_blocks


def compress(x: Tensor, cu_seqlens: Tensor, config: NSAConfig, weights: CompressionWeights | None = None) -> Tensor:
    """Summarise each complete block of keys or values in one.

        out_i = φ(x[i·d], …, x[i·d + l - 1]),   0 <= i < N_c(L)

    Args:
        x: keys before rotary embedding, or values, [T, H_kv, D].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        weights: the parameters of φ in x's dtype; None for the mean.

    Returns:
        [C, H_kv, D] in x's dtype with C = max(T // d, 1): document after document, block after block, then zeros.

    Source: arXiv:2502.11089, eq. 7.
    """
    l, d = config.compress_block_size, config.compress_stride
    summaries = [
        _summary(x[start + i * d : start + i * d + l], weights)
        for start, end in documents(cu_seqlens)
        for i in range(num_compressed_blocks(end - start, config))
    ]
    unused = max(len(x) // d, 1) - len(summaries)
    return torch.stack(summaries + unused * [torch.zeros_like(x[0])])  # [C, H_kv, D]


def _summary(x: Tensor, weights: CompressionWeights | None) -> Tensor:
    """φ(x) = mean(x) + f(x + e), head by head: x [l, H_kv, D] -> [H_kv, D]."""
    mean = x.mean(0)
    if weights is None:
        return mean
    u = (x.transpose(0, 1) + weights.position_embedding).flatten(1)  # [H_kv, l * D], token by token
    y = contract("hi,him->hm", u, weights.in_weight) + weights.in_bias  # [H_kv, M]
    if weights.out_weight is not None and weights.out_bias is not None:
        y = contract("hm,hmd->hd", silu(y), weights.out_weight) + weights.out_bias
    return (mean + y).to(x.dtype)
