"""Summaries of compression blocks, carried on token by token: no step has more to do because a block ends in it.

    Σ_t x[t]   and   Σ_t (x[t] + e[t]) · W[t]   over the tokens t so far of each block that has started and not ended

A token stands in l / d blocks. The one that it completes gets its summary: the mean, plus the learned map's bias, and
for an mlp activation and output layer; a key's is rotated. Keys and values are independent: a program takes one side of
one KV head of one sequence.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.elementwise_triton import rotate_heads, turn
from nsa_kernels.geometry import CompressionWeights
from nsa_kernels.primitives import padded

# B sequences, L tokens in a block, STRIDE from one to the next, S = L / STRIDE slots, H_KV KV heads, D head dim, M
# hidden units. AT_ONCE inputs of a map are multiplied at a time.


@triton.jit
def _map(out, x_ptr, embedding_ptr, weight_ptr, D: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
         AT_ONCE: tl.constexpr):  # fmt: skip
    """out + (x + e) · W of D inputs, float32 [BLOCK_M]; without e where there is none."""
    unit, products = tl.arange(0, BLOCK_M), tl.zeros([AT_ONCE, BLOCK_M], tl.float32)
    for first in tl.range(0, D, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        x = tl.load(x_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        mask = (i < D)[:, None] & (unit < M)[None, :]
        weight = tl.load(weight_ptr + i[:, None] * M + unit[None, :], mask=mask, other=0.0)
        if embedding_ptr is not None:
            x = (x + tl.load(embedding_ptr + i, mask=i < D, other=0.0).to(tl.float32)).to(weight.dtype).to(tl.float32)
        products += x[:, None] * weight.to(tl.float32)
    return out + tl.sum(products, 0)


@triton.jit
def advance_blocks(
    x_ptr, slot_ptr,  # [D], the new key or value and its place in the ring
    sum_ptr, mapped_ptr,  # float32 [S, H_KV, D] and [S, H_KV, M] of the sequence, from this head's on
    weights,  # position embedding [L * D], [L * D, M], [M], [M, D] and [D] of this head, None where there is none
    cos_ptr, sin_ptr,  # [HALF], the token's
    block_cos_ptr, block_sin_ptr,  # [BLOCK_HALF], those of the centre of the block that it may complete
    position,
    ROTATE: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr,
    H_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
    COMPRESSION: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Store a key or value in its slot and add it to its blocks; the summary of the one it completes, [BLOCK_D].

    What is returned means nothing where no block ends; a weight tile holds NUMBERS numbers.
    """
    embedding_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr = weights
    column, unit, S = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M), L // STRIDE
    rotate_heads(x_ptr, slot_ptr, cos_ptr, sin_ptr, column, column < D, HALF if ROTATE else 0)
    tl.debug_barrier()
    x = tl.load(slot_ptr + column, mask=column < D, other=0.0)
    summary = tl.zeros([BLOCK_D], tl.float32)
    for s in tl.static_range(L // STRIDE):
        block, index = position // STRIDE - s, position % STRIDE + s * STRIDE
        exists, row = block >= 0, tl.maximum(block, 0) % S
        total_ptr = sum_ptr + row * (H_KV * D) + column
        total = x.to(tl.float32) + tl.load(total_ptr, mask=exists & (index > 0) & (column < D), other=0.0)
        tl.store(total_ptr, total, mask=exists & (column < D))
        part_ptr = mapped_ptr + row * (H_KV * M)
        if COMPRESSION != "mean":
            part = tl.load(part_ptr + unit, mask=exists & (index > 0) & (unit < M), other=0.0)
            part = _map(part, slot_ptr, embedding_ptr + index * D, in_weight_ptr + index * (D * M), D, M, BLOCK_M,
                        min(BLOCK_D, NUMBERS // BLOCK_M))  # fmt: skip
            tl.store(part_ptr + unit, part, mask=exists & (unit < M))
        if s == L // STRIDE - 1:  # noqa: SIM102 - the oldest; decided when compiling
            if exists & (index == L - 1):
                summary = total / L
                if COMPRESSION == "linear":
                    summary += part + tl.load(in_bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
                if COMPRESSION == "mlp":
                    part += tl.load(in_bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
                    tl.debug_barrier()
                    tl.store(part_ptr + unit, part * tl.sigmoid(part), mask=unit < M)  # the block needs it no more
                    tl.debug_barrier()
                    summary += tl.load(out_bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
                    summary = _map(summary, part_ptr, None, out_weight_ptr, M, D, BLOCK_D,
                                   min(BLOCK_M, NUMBERS // BLOCK_D))  # fmt: skip
                if BLOCK_HALF > 0:
                    paired = column < 2 * BLOCK_HALF
                    partner = tl.where(column < BLOCK_HALF, column + BLOCK_HALF, column - BLOCK_HALF)
                    partner = tl.gather(summary, tl.where(paired, partner, column), 0)
                    summary = turn(summary, partner, column, block_cos_ptr, block_sin_ptr, BLOCK_HALF)
    return summary.to(x.dtype)


def weight_arguments(weights: tuple[CompressionWeights, CompressionWeights] | None) -> tuple[Any, ...]:
    """What a kernel takes of the learned parts: five pairs (keys, values), then M of both, padded M, and the kind."""
    if weights is None:
        return ((None, None),) * 5, (0, 0), (1, 1), "mean"
    pairs = tuple((_contiguous(k), _contiguous(v)) for k, v in zip(*weights, strict=True))
    M = tuple(x.in_weight.shape[2] for x in weights)
    return pairs, M, tuple(map(padded, M)), "linear" if weights[0].out_weight is None else "mlp"


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


TILE_NUMBERS = 8192
"""Weights that a program loads at a time."""
