"""Summaries of the compression blocks that the new token of each sequence completes, in two launches.

    1. the learned map's input layer, (x + e) W, divided over programs: few weights each, read by all of them at once
    2. the sum of the parts, activation and output layer; the mean; the key's rotation; the row of the cache

A block's tokens are all there are in the ring of pending ones. The grids depend on shapes alone, so a CUDA graph can
replay them; where a tile of sequences completes no block, its programs end at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.elementwise_triton import turn
from nsa_kernels.geometry import CompressionWeights
from nsa_kernels.primitives import dot_precision, padded, wide

# B sequences, L tokens in a block, STRIDE from one to the next, C blocks, H_KV KV heads, D head dim, M hidden units,
# P parts of the L * D inputs of a head. Tuples are of keys and values; a part has room for the larger M.


@triton.jit
def _map_kernel(
    pending_ptrs,  # tuple of [B, L, H_KV, D], token t in slot t % L
    embedding_ptrs,  # tuple of [H_KV, L * D]
    weight_ptrs,  # tuple of [H_KV, L * D, M]
    blocks_ptr,  # [B], -1 for none
    parts_ptr,  # float32 [2, B, H_KV, P, ROOM]
    B, num_parts, STRIDE,
    L: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, M: tl.constexpr, ROOM: tl.constexpr,
    SEQUENCES: tl.constexpr, INPUTS: tl.constexpr, UNITS: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program multiplies a part of the inputs of one KV head, keys or values, by the weights of some units."""
    part, kv_head = tl.program_id(0) % num_parts, tl.program_id(1) % H_KV
    sequence = tl.program_id(2) * SEQUENCES + tl.arange(0, SEQUENCES)
    await_launch_before(EARLY)
    block = tl.load(blocks_ptr + sequence, mask=sequence < B, other=-1).to(tl.int32)
    if tl.max(block, 0) < 0:
        return
    let_next_begin(EARLY)
    i, unit = part * INPUTS + tl.arange(0, INPUTS), tl.program_id(0) // num_parts * UNITS + tl.arange(0, UNITS)
    rows = sequence.to(tl.int64)[:, None] * L
    for side in tl.static_range(2):
        if tl.program_id(1) // H_KV == side:
            exists, row = i < L * D[side], wide(kv_head) * L * D[side] + i
            mask = exists[:, None] & (unit < M[side])[None, :]
            weight = tl.load(weight_ptrs[side] + row[:, None] * M[side] + unit[None, :], mask=mask, other=0.0)
            slot = (block[:, None] * STRIDE + i[None, :] // D[side]) % L
            source = ((rows + slot) * H_KV + kv_head) * D[side] + i[None, :] % D[side]
            mask = (block >= 0)[:, None] & exists[None, :]
            x = tl.load(pending_ptrs[side] + source, mask=mask, other=0.0).to(tl.float32)
            x += tl.load(embedding_ptrs[side] + row, mask=exists, other=0.0).to(tl.float32)[None, :]
            out = tl.dot(x.to(weight.dtype), weight, input_precision=PRECISION)
            target = (((side * B + sequence.to(tl.int64)) * H_KV + kv_head) * num_parts + part) * ROOM
            mask = (block >= 0)[:, None] & (unit < M[side])[None, :]
            tl.store(parts_ptr + target[:, None] + unit[None, :], out, mask=mask)


@triton.jit
def _sum_of_parts(parts_ptr, bias_ptr, unit, num_parts, M: tl.constexpr, ROOM: tl.constexpr, PARTS: tl.constexpr):
    """The input layer of some units, float32, PARTS parts at a time."""
    total = tl.load(bias_ptr + unit, mask=unit < M, other=0.0).to(tl.float32)
    for first in tl.range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < num_parts)[:, None] & (unit < M)[None, :]
        total += tl.sum(tl.load(parts_ptr + part[:, None] * ROOM + unit[None, :], mask=mask, other=0.0), 0)
    return total


@triton.jit
def _finish_kernel(
    pending_ptrs,  # tuple of [B, L, H_KV, D]
    summary_ptrs,  # tuple of [B, C, H_KV, D], block i in row i
    in_bias_ptrs, out_weight_ptrs, out_bias_ptrs,  # tuples of [H_KV, M], [H_KV, M, D] and [H_KV, D]
    cos_ptr, sin_ptr,  # [B, HALF]
    blocks_ptr,  # [B], -1 for none
    parts_ptr,  # float32 [2, B, H_KV, P, ROOM]
    B, C, num_parts,
    L: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, M: tl.constexpr, ROOM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr, PARTS: tl.constexpr, COMPRESSION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program writes the summary of one KV head of one sequence, of keys or of values."""
    kv_head, sequence = tl.program_id(0) % H_KV, wide(tl.program_id(1))
    await_launch_before(EARLY)
    block = tl.load(blocks_ptr + sequence)
    if block < 0:
        return
    let_next_begin(EARLY)
    column, i = tl.arange(0, BLOCK_D), tl.arange(0, AT_ONCE)
    for side in tl.static_range(2):
        if tl.program_id(0) // H_KV == side:
            total = tl.zeros([BLOCK_D], tl.float32)
            for first in tl.range(0, L, AT_ONCE):
                source = ((sequence * L + (first + i)[:, None]) * H_KV + kv_head) * D[side] + column[None, :]
                mask = (first + i < L)[:, None] & (column < D[side])[None, :]
                total += tl.sum(tl.load(pending_ptrs[side] + source, mask=mask, other=0.0).to(tl.float32), 0)
            summary = total / L
            parts = parts_ptr + ((side * B + sequence) * H_KV + kv_head) * num_parts * ROOM
            if COMPRESSION == "linear":
                summary += _sum_of_parts(parts, in_bias_ptrs[side] + kv_head * M[side], column, num_parts,
                                         M[side], ROOM, PARTS)  # fmt: skip
            if COMPRESSION == "mlp":
                bias = tl.load(out_bias_ptrs[side] + kv_head * D[side] + column, mask=column < D[side], other=0.0)
                summary += bias.to(tl.float32)
                for first in tl.range(0, M[side], AT_ONCE):
                    unit = first + i
                    mask = (unit < M[side])[:, None] & (column < D[side])[None, :]
                    source = (kv_head * M[side] + unit)[:, None] * D[side] + column[None, :]
                    weight = tl.load(out_weight_ptrs[side] + source, mask=mask, other=0.0).to(tl.float32)
                    mapped = _sum_of_parts(parts, in_bias_ptrs[side] + kv_head * M[side], unit, num_parts,
                                           M[side], ROOM, PARTS)  # fmt: skip
                    summary += tl.sum((mapped * tl.sigmoid(mapped))[:, None] * weight, 0)
            if side == 0 and HALF > 0:
                paired = column < 2 * HALF
                partner = tl.where(column < HALF, column + HALF, tl.where(paired, column - HALF, column))
                summary = turn(summary, tl.gather(summary, partner, 0), column,
                               cos_ptr + sequence * HALF, sin_ptr + sequence * HALF, HALF)  # fmt: skip
            target = summary_ptrs[side] + ((sequence * C + block) * H_KV + kv_head) * D[side] + column
            tl.store(target, summary.to(summary_ptrs[side].dtype.element_ty), mask=column < D[side])


def summarise_blocks(
    pending: tuple[Tensor, ...],
    summaries: tuple[Tensor, ...],
    blocks: Tensor,
    stride: int,
    weights: tuple[CompressionWeights, CompressionWeights] | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> None:
    """`decode.summarise_blocks`; the rows that are written are contiguous."""
    pending, summaries = tuple(x.contiguous() for x in pending), tuple(summaries)
    (B, L, H_KV, _), D = pending[0].shape, tuple(x.shape[3] for x in pending)
    learned = CompressionWeights(*([(None, None)] * 5 if weights is None else map(_contiguous, *weights)))
    M, parts, compression = (0, 0), blocks.new_empty(0, 0, dtype=torch.float32), "mean"
    if weights is not None:
        M = tuple(x.shape[2] for x in learned.in_weight)
        parts = _input_layer(pending, learned, blocks, stride, M)
        compression = "linear" if weights[0].out_weight is None else "mlp"
    (num_parts, room), (early, overlap) = parts.shape[-2:], early_start(blocks.device)
    cos, sin = (None, None) if rotary is None else (x.contiguous() for x in rotary)
    half, block_d = 0 if cos is None else cos.shape[1], padded(max(D))
    rows = min(padded(max(L, *M)), _TILE // block_d)
    _finish_kernel[(2 * H_KV, B)](
        pending, summaries, learned.in_bias, learned.out_weight, learned.out_bias, cos, sin, blocks, parts,
        B, summaries[0].shape[1], num_parts, L, H_KV, D, M, room, half, block_d, rows,
        min(padded(num_parts), _TILE // max(rows, block_d)), compression, early, num_warps=8, **overlap,
    )  # fmt: skip


def _input_layer(pending: tuple[Tensor, ...], learned: Any, blocks: Tensor, stride: int, M: tuple[int, ...]) -> Tensor:
    """Parts of (x + e) W of the sequences that complete a block, float32 [2, B, H_kv, P, larger M]."""
    (B, L, H_KV, _), D, weights = pending[0].shape, tuple(x.shape[3] for x in pending), learned.in_weight
    inputs, units = _WEIGHT_BYTES // weights[0].element_size() // _UNITS, min(padded(max(M)), _UNITS)
    num_parts = triton.cdiv(L * max(D), inputs)
    parts = blocks.new_empty(2, B, H_KV, num_parts, max(M), dtype=torch.float32)
    early, overlap = early_start(blocks.device)
    _map_kernel[(num_parts * triton.cdiv(max(M), units), 2 * H_KV, triton.cdiv(B, _SEQUENCES))](
        pending, learned.position_embedding, weights, blocks, parts, B, num_parts, stride,
        L, H_KV, D, M, max(M), _SEQUENCES, inputs, units, dot_precision(weights[0].dtype), early,
        num_warps=4, **overlap,
    )  # fmt: skip
    return parts


def _contiguous(k: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if k is None else k.contiguous(), None if v is None else v.contiguous()


_SEQUENCES = 16
"""Sequences that share what a program reads of the weights: as many as a matrix instruction takes."""
_UNITS = 64
"""Most hidden units of a program."""
_WEIGHT_BYTES = 2**14
"""Weights that a program reads: so few that hundreds of programs read all of them at once."""
_TILE = 8192
"""Numbers that a program of the second launch holds at a time."""
