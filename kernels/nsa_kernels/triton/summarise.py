"""Summaries of compression blocks, carried on token by token: no step has more to do because a block ends in it.

    Σ_t x[t]   and   Σ_t (x[t] + e[t]) · W[t]   over the tokens t so far of each block that has started and not ended

A token stands in l / d blocks. The one that it completes gets its summary: the mean, plus the learned map's bias, and
for an mlp activation and output layer; a key's is rotated. A program takes one of the blocks, of the keys or the values
of one KV head of one sequence: none waits for another, and all that it reads is loaded at once.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.geometry import CompressionWeights
from nsa_kernels.triton.elementwise import turn
from nsa_kernels.triton.primitives import padded

# B sequences, L tokens in a block, STRIDE from one to the next, S = L / STRIDE slots, H_KV KV heads, D head dim, M
# hidden units. AT_ONCE inputs of a map are multiplied at a time.


@triton.jit
def _rotated(x_ptr, i, cos_ptr, sin_ptr, D: tl.constexpr, HALF: tl.constexpr):
    """Elements of a head, rotated if HALF is not 0."""
    x = tl.load(x_ptr + i, mask=i < D, other=0.0)
    if HALF > 0:
        other = tl.where(i < HALF, i + HALF, i - HALF)
        partner = tl.load(x_ptr + other, mask=i < 2 * HALF, other=0.0).to(tl.float32)
        x = turn(x.to(tl.float32), partner, i, cos_ptr, sin_ptr, HALF).to(x.dtype)
    return x


@triton.jit
def _input_layer(x_ptr, embedding_ptr, weight_ptr, cos_ptr, sin_ptr, D: tl.constexpr, HALF: tl.constexpr,
                 M: tl.constexpr, BLOCK_M: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """(x + e) · W of one token, float32 [BLOCK_M]."""
    unit, products = tl.arange(0, BLOCK_M), tl.zeros([AT_ONCE, BLOCK_M], tl.float32)
    for first in tl.range(0, D, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        mask = (i < D)[:, None] & (unit < M)[None, :]
        weight = tl.load(weight_ptr + i[:, None] * M + unit[None, :], mask=mask, other=0.0)
        x = _rotated(x_ptr, i, cos_ptr, sin_ptr, D, HALF).to(tl.float32)
        x += tl.load(embedding_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        products += x.to(weight.dtype).to(tl.float32)[:, None] * weight.to(tl.float32)
    return tl.sum(products, 0)


@triton.jit
def _output_layer(hidden, hidden_ptr, weight_ptr, M: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr,
                  BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """hidden · W, float32 [BLOCK_D]; where the weights are many, hidden units go through `hidden_ptr`."""
    column, products = tl.arange(0, BLOCK_D), tl.zeros([AT_ONCE, BLOCK_D], tl.float32)
    if AT_ONCE < BLOCK_M:
        unit = tl.arange(0, BLOCK_M)
        tl.debug_barrier()
        tl.store(hidden_ptr + unit, hidden, mask=unit < M)
        tl.debug_barrier()
    for first in tl.range(0, M, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        mask = (i < M)[:, None] & (column < D)[None, :]
        weight = tl.load(weight_ptr + i[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        part = hidden if AT_ONCE == BLOCK_M else tl.load(hidden_ptr + i, mask=i < M, other=0.0)
        products += part[:, None] * weight
    return tl.sum(products, 0)


@triton.jit
def advance_block(
    s,  # how many blocks before the newest
    x_ptr, slot_ptr,  # [D], the new key or value and its place in the ring
    sum_ptr, mapped_ptr,  # float32 [S, H_KV, D] and [S, H_KV, M] of the sequence, from this head's on
    weights,  # position embedding [L * D], [L * D, M], [M], [M, D] and [D] of this head, None where there is none
    cos_ptr, sin_ptr,  # [HALF], the token's
    block_cos_ptr, block_sin_ptr,  # [BLOCK_HALF], those of the centre of the block that it may complete
    position,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr, H_KV: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr, COMPRESSION: tl.constexpr,
    NUMBERS: tl.constexpr,
):  # fmt: skip
    """Add a key or value to one of its blocks; the block's summary where the token completes it, [BLOCK_D].

    The oldest block's program also stores it in its slot; what it returns means nothing where the block goes on. A tile
    of weights holds NUMBERS numbers.
    """
    embedding_ptr, in_weight_ptr, in_bias_ptr, out_weight_ptr, out_bias_ptr = weights
    S: tl.constexpr = L // STRIDE
    column, unit = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    block, index = position // STRIDE - s, position % STRIDE + s * STRIDE
    exists, row = block >= 0, tl.maximum(block, 0) % S
    goes_on, ends = exists & (index > 0), exists & (index == L - 1)
    total_ptr, part_ptr = sum_ptr + row * (H_KV * D), mapped_ptr + row * (H_KV * M)
    x = _rotated(x_ptr, column, cos_ptr, sin_ptr, D, HALF)
    total = tl.load(total_ptr + column, mask=goes_on & (column < D), other=0.0) + x.to(tl.float32)
    if COMPRESSION != "mean":
        part = tl.load(part_ptr + unit, mask=goes_on & (unit < M), other=0.0)
        part += _input_layer(x_ptr, embedding_ptr + index * D, in_weight_ptr + index * (D * M), cos_ptr, sin_ptr,
                             D, HALF, M, BLOCK_M, min(BLOCK_D, NUMBERS // BLOCK_M))  # fmt: skip
    tl.debug_barrier()  # several warps hold the same columns: all have loaded them before one stores
    if COMPRESSION != "mean":
        tl.store(part_ptr + unit, part, mask=exists & (unit < M))
    tl.store(total_ptr + column, total, mask=exists & (column < D))
    tl.store(slot_ptr + column, x, mask=(s == S - 1) & (column < D))
    summary = tl.zeros([BLOCK_D], tl.float32)
    if ends:
        summary = total / L
        if COMPRESSION == "linear":
            summary += part + tl.load(in_bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
        if COMPRESSION == "mlp":
            hidden = part + tl.load(in_bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
            summary += tl.load(out_bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
            summary += _output_layer(hidden * tl.sigmoid(hidden), part_ptr, out_weight_ptr, M, BLOCK_M, D, BLOCK_D,
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
