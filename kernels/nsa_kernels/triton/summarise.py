"""Summaries of compression blocks, carried on token by token: no step has more to do because a block ends in it.

    Σ_t x[t]   and   Σ_t (x[t] + e[t]) · W[t]   over the tokens t so far of each block that has started and not ended

A token stands in l / d blocks. The one that it completes gets its summary: the mean, plus the learned map's bias, and
for an mlp activation and output layer; a key's is rotated. A program takes one of the blocks, of the keys or the values
of one KV head of one sequence: none waits for another, and all that it reads is loaded at once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.triton.elementwise import turn
from nsa_kernels.triton.primitives import padded, wide

# B sequences, L tokens in a block, STRIDE from one to the next, S = L / STRIDE slots, H_KV KV heads, D head dim, M
# hidden units.


class Sides(NamedTuple):
    """Something of the keys and of the values."""

    k: Any
    v: Any


class Token(NamedTuple):
    """A new key or value of one KV head, where it goes, and what is carried on with it."""

    x: Any  # [D]
    slot: Any  # [D], its place in the ring
    sum: Any  # float32 [S, H_KV, D] of the sequence, from this head's on
    mapped: Any  # float32 [S, H_KV, M]


class Angles(NamedTuple):
    """Cosines and sines."""

    cos: Any
    sin: Any


class SummarySizes(NamedTuple):
    """Sizes of the keys or of the values that are summarised, constants of a kernel."""

    L: int
    STRIDE: int
    H_KV: int
    D: int
    BLOCK_D: int
    HALF: int  # pairs of dimensions that a token is rotated in
    BLOCK_HALF: int  # and its summary
    COMPRESSION: str
    M: int
    BLOCK_M: int
    INPUTS: int  # rows of the input layer's map that are multiplied at a time
    HIDDEN: int  # rows of the output layer's


@triton.jit
def _rotated(x_ptr, i, angles, SIZES: tl.constexpr):
    """Elements of a head, rotated if HALF is not 0."""
    HALF: tl.constexpr = SIZES.HALF
    x = tl.load(x_ptr + i, mask=i < SIZES.D, other=0.0)
    if HALF > 0:
        other = tl.where(i < HALF, i + HALF, i - HALF)
        partner = tl.load(x_ptr + other, mask=i < 2 * HALF, other=0.0).to(tl.float32)
        x = turn(x.to(tl.float32), partner, i, angles.cos, angles.sin, HALF).to(x.dtype)
    return x


@triton.jit
def _input_layer(x_ptr, embedding_ptr, weight_ptr, angles, SIZES: tl.constexpr):
    """(x + e) · W of one token, float32 [BLOCK_M]."""
    D: tl.constexpr = SIZES.D
    M: tl.constexpr = SIZES.M
    BLOCK_M: tl.constexpr = SIZES.BLOCK_M
    AT_ONCE: tl.constexpr = SIZES.INPUTS
    unit, products = tl.arange(0, BLOCK_M), tl.zeros([AT_ONCE, BLOCK_M], tl.float32)
    for first in tl.range(0, D, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        mask = (i < D)[:, None] & (unit < M)[None, :]
        weight = tl.load(weight_ptr + i[:, None] * M + unit[None, :], mask=mask, other=0.0)
        x = _rotated(x_ptr, i, angles, SIZES).to(tl.float32)
        x += tl.load(embedding_ptr + i, mask=i < D, other=0.0).to(tl.float32)
        products += x.to(weight.dtype).to(tl.float32)[:, None] * weight.to(tl.float32)
    return tl.sum(products, 0)


@triton.jit
def _output_layer(hidden, hidden_ptr, weight_ptr, SIZES: tl.constexpr):
    """hidden · W, float32 [BLOCK_D]; where the weights are many, hidden units go through `hidden_ptr`."""
    D: tl.constexpr = SIZES.D
    M: tl.constexpr = SIZES.M
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    AT_ONCE: tl.constexpr = SIZES.HIDDEN
    column, products = tl.arange(0, BLOCK_D), tl.zeros([AT_ONCE, BLOCK_D], tl.float32)
    if AT_ONCE < SIZES.BLOCK_M:
        unit = tl.arange(0, SIZES.BLOCK_M)
        tl.debug_barrier()
        tl.store(hidden_ptr + unit, hidden, mask=unit < M)
        tl.debug_barrier()
    for first in tl.range(0, M, AT_ONCE):
        i = first + tl.arange(0, AT_ONCE)
        mask = (i < M)[:, None] & (column < D)[None, :]
        weight = tl.load(weight_ptr + i[:, None] * D + column[None, :], mask=mask, other=0.0).to(tl.float32)
        part = hidden if AT_ONCE == SIZES.BLOCK_M else tl.load(hidden_ptr + i, mask=i < M, other=0.0)
        products += part[:, None] * weight
    return tl.sum(products, 0)


@triton.jit
def advance_block(
    s,  # how many blocks before the newest
    token,
    weights,  # CompressionWeights of all heads, None of the mean
    angles,  # [HALF], the token's
    block_angles,  # [BLOCK_HALF], those of the centre of the block that it may complete
    position,
    kv_head,
    SIZES: tl.constexpr,
):
    """Add a key or value to one of its blocks; the block's summary where the token completes it, [BLOCK_D].

    The oldest block's program also stores it in its slot; what it returns means nothing where the block goes on.
    """
    L: tl.constexpr = SIZES.L
    STRIDE: tl.constexpr = SIZES.STRIDE
    D: tl.constexpr = SIZES.D
    M: tl.constexpr = SIZES.M
    COMPRESSION: tl.constexpr = SIZES.COMPRESSION
    BLOCK_D: tl.constexpr = SIZES.BLOCK_D
    S: tl.constexpr = L // STRIDE
    if COMPRESSION != "mean":
        rows, in_bias_ptr = wide(kv_head) * (L * D), weights.in_bias + kv_head * M
        embedding_ptr, in_weight_ptr = weights.position_embedding + rows, weights.in_weight + rows * M
    if COMPRESSION == "mlp":
        out_weight_ptr, out_bias_ptr = weights.out_weight + kv_head * (M * D), weights.out_bias + kv_head * D
    column, unit = tl.arange(0, BLOCK_D), tl.arange(0, SIZES.BLOCK_M)
    block, index = position // STRIDE - s, position % STRIDE + s * STRIDE
    exists, row = block >= 0, tl.maximum(block, 0) % S
    goes_on, ends = exists & (index > 0), exists & (index == L - 1)
    total_ptr, part_ptr = token.sum + row * (SIZES.H_KV * D), token.mapped + row * (SIZES.H_KV * M)
    x = _rotated(token.x, column, angles, SIZES)
    total = tl.load(total_ptr + column, mask=goes_on & (column < D), other=0.0) + x.to(tl.float32)
    if COMPRESSION != "mean":
        part = tl.load(part_ptr + unit, mask=goes_on & (unit < M), other=0.0)
        part += _input_layer(token.x, embedding_ptr + index * D, in_weight_ptr + index * (D * M), angles, SIZES)
    tl.debug_barrier()  # several warps hold the same columns: all have loaded them before one stores
    if COMPRESSION != "mean":
        tl.store(part_ptr + unit, part, mask=exists & (unit < M))
    tl.store(total_ptr + column, total, mask=exists & (column < D))
    tl.store(token.slot + column, x, mask=(s == S - 1) & (column < D))
    summary = tl.zeros([BLOCK_D], tl.float32)
    if ends:
        summary = total / L
        if COMPRESSION == "linear":
            summary += part + tl.load(in_bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
        if COMPRESSION == "mlp":
            hidden = part + tl.load(in_bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
            summary += tl.load(out_bias_ptr + column, mask=column < D, other=0.0).to(tl.float32)
            summary += _output_layer(hidden * tl.sigmoid(hidden), part_ptr, out_weight_ptr, SIZES)
        summary = _rotated_summary(summary, column, block_angles, SIZES.BLOCK_HALF)
    return summary.to(x.dtype)


@triton.jit
def _rotated_summary(summary, column, angles, HALF: tl.constexpr):
    """A summary, rotated if HALF is not 0."""
    if HALF > 0:
        paired = column < 2 * HALF
        partner = tl.where(column < HALF, column + HALF, column - HALF)
        partner = tl.gather(summary, tl.where(paired, partner, column), 0)
        summary = turn(summary, partner, column, angles.cos, angles.sin, HALF)
    return summary


def weights_for_kernel(weights: tuple[CompressionWeights, CompressionWeights] | None) -> Sides:
    """The learned parts of the summaries of keys and values as a kernel takes them; None of the mean."""
    if weights is None:
        return Sides(None, None)
    return Sides(*(CompressionWeights._make(map(_contiguous, side)) for side in weights))


def summary_sizes(
    weights: CompressionWeights | None, config: NSAConfig, H_KV: int, D: int, HALF: int, BLOCK_HALF: int, numbers: int
) -> SummarySizes:
    """The sizes of keys or values; a tile of weights holds so many `numbers`."""
    sizes = (config.compress_block_size, config.compress_stride, H_KV, D, padded(D), HALF, BLOCK_HALF)
    if weights is None:
        return SummarySizes(*sizes, "mean", 0, 1, 0, 0)
    M, kind = weights.in_weight.shape[2], "linear" if weights.out_weight is None else "mlp"
    rows = min(padded(D), numbers // padded(M)), min(padded(M), numbers // padded(D))
    return SummarySizes(*sizes, kind, M, padded(M), *rows)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


TILE_NUMBERS = 8192
"""Weights that a program loads at a time."""
