"""Attention of one new token of each sequence to its cache: three launches, whatever the lengths.

    1. attend the summaries, divided over programs; keep what the importance of each block needs
    2. choose the blocks; meanwhile merge the compressed branch and attend the window
    3. attend the chosen blocks and sum the branches by their gates

A tile is the G query heads of one KV head: every key is read once for all of them. What a program computes depends on
the positions, which it reads itself; the grids depend on the cache's size alone, so a CUDA graph can replay them.

The importance of a block is a sum of exp(score - lse) over the heads of a group, and lse is known in launch 2 only.
Launch 1 therefore writes, a tile of keys at a time, the planes of `block_selection.py` relative to the running maximum
of each head, and that maximum: launch 2 multiplies by exp(maximum - lse).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.block_selection import FORCED, best
from nsa_kernels.geometry import NSAConfig, NSAOutput
from nsa_kernels.primitives import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    dot_precision,
    interpreted,
    load_rows,
    padded,
    softmax_step,
    store_rows,
    wide,
)

# B sequences, S, W or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, n slots of
# chosen blocks, J selection blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.


@triton.jit
def _visible_run(position, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """First and end of the summaries (blocks of 1 are tokens) that a token sees; of the last WINDOW if it is not 0."""
    length = position + 1
    end = tl.where(length >= BLOCK_SIZE, (length - BLOCK_SIZE) // STRIDE + 1, 0)
    return tl.maximum(end - WINDOW, 0) if WINDOW > 0 else 0, end


@triton.jit
def _load_queries(q_ptr, sequence, kv_head, H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
                  D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """The queries of one KV head, and the rows [B * H] they stand in; rows past the group repeat its last."""
    rows = (wide(sequence) * H_KV + kv_head) * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1)
    return load_rows(q_ptr, rows, D, BLOCK_D), rows


@triton.jit
def _load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV: tl.constexpr, D_QK: tl.constexpr,
               D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Keys and values of tokens of a sequence from a cache [B, slots, H_KV, D], token t in slot t % slots."""
    rows = (wide(sequence) * slots + token % slots) * H_KV + kv_head
    return load_rows(k_ptr, rows, D_QK, BLOCK_QK), load_rows(v_ptr, rows, D_V, BLOCK_V)


@triton.jit
def _store_part(o_ptr, stats_ptr, part, row_max, row_sum, acc, GROUP: tl.constexpr, ROWS: tl.constexpr,
                D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write an unfinished softmax: acc to [parts, GROUP, D], maximum and sum to [parts, 2, GROUP]."""
    head = tl.arange(0, ROWS)
    store_rows(o_ptr, part * GROUP + head, head < GROUP, acc, D, BLOCK_D)
    tl.store(stats_ptr + part * 2 * GROUP + head, row_max, mask=head < GROUP)
    tl.store(stats_ptr + (part * 2 + 1) * GROUP + head, row_sum, mask=head < GROUP)


@triton.jit
def _merge_parts(o_ptr, stats_ptr, first_part, num_parts, GROUP: tl.constexpr, ROWS: tl.constexpr,
                 D: tl.constexpr, first_column, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """COLUMNS columns of o, [ROWS, COLUMNS], of a softmax whose keys were divided; 0 where there were none."""
    head, column = tl.minimum(tl.arange(0, ROWS), GROUP - 1), first_column + tl.arange(0, COLUMNS)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, num_parts, AT_ONCE):  # loads of several parts at a time: none waits for another
        i = start + tl.arange(0, AT_ONCE)
        exists, part = i < num_parts, first_part + tl.minimum(i, num_parts - 1)
        stats = stats_ptr + part[:, None] * 2 * GROUP + head[None, :]
        part_max = tl.where(exists[:, None], tl.load(stats), LOWEST)  # [AT_ONCE, ROWS]
        part_sum = tl.load(stats + GROUP)
        rows = part[:, None] * GROUP + head[None, :]
        mask = exists[:, None, None] & (column < D)[None, None, :]
        o = tl.load(o_ptr + rows[:, :, None] * D + column[None, None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        old, new = tl.exp2(row_max - new_max), tl.exp2(part_max - new_max[None, :])
        new = tl.where(exists[:, None], new, 0.0)
        row_sum = row_sum * old + tl.sum(part_sum * new, 0)
        acc = acc * old[:, None] + tl.sum(o * new[:, :, None], 0)
        row_max = new_max
    return acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]


@triton.jit
def _merge_columns(o_ptr, stats_ptr, out_ptr, row, num_parts, first_column, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   D: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Merge the parts of one sequence and KV head and write COLUMNS columns of [B * H, D]."""
    o = _merge_parts(o_ptr, stats_ptr, row * num_parts, num_parts, GROUP, ROWS, D, first_column, COLUMNS, 8)
    head, column = tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    out = out_ptr + (row * GROUP + head)[:, None] * D + column[None, :]
    tl.store(out, o.to(out_ptr.dtype.element_ty), mask=(head < GROUP)[:, None] & (column < D)[None, :])


@triton.jit
def _attend_part(
    q, k_ptr, v_ptr, sequence, lo, hi, slots, kv_head, scale_log2, planes_ptr, maxima_ptr, row, J, tiles,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running softmax of queries over the keys [lo, hi), with PLANES also the planes of each tile of keys."""
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for start in tl.range(lo, hi, KEYS):
        token = start + tl.arange(0, KEYS)
        k, v = _load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token < hi)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        if PLANES > 0:
            new_max = tl.maximum(row_max, tl.max(products, 1) * scale_log2)
            p = tl.reshape(tl.exp2(products * scale_log2 - new_max[:, None]), [ROWS, KEYS // R, R])
            head, r, j = tl.arange(0, ROWS), tl.arange(0, R), start // R + tl.arange(0, KEYS // R)
            tl.store(maxima_ptr + (row * tiles + start // KEYS) * GROUP + head, new_max, mask=head < GROUP)
            for plane in tl.static_range(PLANES):
                weight = tl.minimum(r + SPAN, (plane + 1) * R) - tl.maximum(r, plane * R)
                part = tl.sum(p * tl.maximum(weight, 0).to(tl.float32)[None, None, :], 2)
                out = ((row * PLANES + plane) * GROUP + head)[:, None] * J + j[None, :]
                tl.store(planes_ptr + out, part, mask=(head < GROUP)[:, None] & (j < J)[None, :])
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    return row_max, row_sum, acc


@triton.jit
def _parts_kernel(
    q_ptr,  # [B, H, D_QK]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    positions_ptr,  # [B]
    o_ptr,  # float32 [B, H_KV, P, GROUP, D_V]
    stats_ptr,  # float32 [B, H_KV, P, 2, GROUP]
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    maxima_ptr,  # float32 [B, H_KV, tiles, GROUP]
    slots, J, tiles, scale_log2,
    BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to its share of the keys that they see."""
    part, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = _visible_run(tl.load(positions_ptr + sequence), BLOCK_SIZE, STRIDE, WINDOW)
    share = tl.cdiv(tl.cdiv(end - first, KEYS), tl.num_programs(0)) * KEYS
    lo = first + part * share
    q, _ = _load_queries(q_ptr, sequence, kv_head, H_KV, GROUP, ROWS, D_QK, BLOCK_QK)
    row = wide(sequence) * H_KV + kv_head
    row_max, row_sum, acc = _attend_part(
        q, k_ptr, v_ptr, sequence, lo, tl.minimum(lo + share, end), slots, kv_head, scale_log2,
        planes_ptr, maxima_ptr, row, J, tiles,
        H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, R, SPAN, PLANES, PRECISION)  # fmt: skip
    out = row * tl.num_programs(0) + part
    _store_part(o_ptr, stats_ptr, out, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _merge_kernel(
    o_ptr,  # float32 [B, H_KV, P, GROUP, D_V]
    stats_ptr,  # float32 [B, H_KV, P, 2, GROUP]
    out_ptr,  # [B, H, D_V]
    num_parts,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_V: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program merges the parts of some columns of one KV head of one sequence."""
    row = wide(tl.program_id(2)) * H_KV + tl.program_id(1)
    _merge_columns(o_ptr, stats_ptr, out_ptr, row, num_parts, tl.program_id(0) * COLUMNS, GROUP, ROWS, D_V, COLUMNS)


@triton.jit
def _importance(planes_ptr, maxima_ptr, stats_ptr, j, visible, J, num_parts, GROUP: tl.constexpr, R: tl.constexpr,
                PLANES: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
                HEADS: tl.constexpr):  # fmt: skip
    """Σ over the heads of exp(maximum - lse) · planes, of blocks j; HEADS at a time."""
    importance = tl.zeros([BLOCKS], tl.float32)
    part = tl.arange(0, PARTS)
    for first in tl.static_range(0, GROUP, HEADS):
        head = first + tl.arange(0, HEADS)
        exists, head = head < GROUP, tl.minimum(head, GROUP - 1)
        stats, known = stats_ptr + part[None, :] * 2 * GROUP + head[:, None], (part < num_parts)[None, :]
        part_max = tl.load(stats, mask=known, other=LOWEST)
        row_max = tl.max(part_max, 1)
        part_sum = tl.load(stats + GROUP, mask=known, other=0.0)
        lse = row_max + tl.log2(tl.sum(part_sum * tl.exp2(part_max - row_max[:, None]), 1))
        for plane in tl.static_range(PLANES):
            source = j - plane
            written = exists[:, None] & ((source >= 0) & (source * R < visible))[None, :]
            sums = planes_ptr + wide(plane * GROUP) * J + head.to(tl.int64)[:, None] * J + source[None, :]
            maxima = maxima_ptr + (source * R // KEYS * GROUP)[None, :] + head[:, None]
            maximum = tl.load(maxima, mask=written, other=LOWEST)
            p = tl.load(sums, mask=written, other=0.0) * tl.exp2(maximum - lse[:, None])
            importance += tl.sum(p, 0)
    return importance


@triton.jit
def _choose(
    planes_ptr, maxima_ptr, stats_ptr, bits_ptr, blocks_ptr, indices_ptr, row, segment, num_segments, position, J,
    num_parts, GROUP: tl.constexpr, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PLANES: tl.constexpr,
    KEYS: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Choose among the blocks of a segment of one sequence and KV head; where it is the only one, for good."""
    own, slot = position // BLOCK_SIZE, tl.arange(0, BLOCK_SLOTS)
    if own < SLOTS:
        chosen_all = tl.where(slot <= own, slot, -1)
        tl.store(indices_ptr + row * SLOTS + slot, chosen_all, mask=(slot < SLOTS) & (segment == 0))
    else:
        _, visible = _visible_run(position, COMPRESS_SIZE, STRIDE, 0)
        j = segment * BLOCKS + tl.arange(0, BLOCKS)
        R: tl.constexpr = BLOCK_SIZE // STRIDE
        importance = _importance(planes_ptr, maxima_ptr, stats_ptr, j, visible, J, num_parts,
                                 GROUP, R, PLANES, KEYS, PARTS, BLOCKS, 4)  # fmt: skip
        forced = (j < INIT) | (j > own - LOCAL)
        bits = tl.minimum(tl.maximum(importance.to(tl.int32, bitcast=True), 0), FORCED - 1)
        bits = tl.where(j <= own, tl.where(forced, FORCED, bits), -1)
        chosen = best(bits, SLOTS)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        if num_segments == 1:
            tl.store(indices_ptr + row * SLOTS + place, j, mask=chosen)
        else:
            out = (row * num_segments + segment) * SLOTS
            tl.store(bits_ptr + out + slot, tl.full([BLOCK_SLOTS], -1, tl.int32), mask=slot < SLOTS)
            tl.debug_barrier()
            tl.store(bits_ptr + out + place, bits, mask=chosen)
            tl.store(blocks_ptr + out + place, j, mask=chosen)


@triton.jit
def _choose_kernel(
    q_ptr,  # [B, H, D_QK]
    k_ptr, v_ptr,  # [B, slots, H_KV, D], of the sliding branch
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the compressed branch
    planes_ptr, maxima_ptr,  # float32 [B, H_KV, PLANES, GROUP, J] and [B, H_KV, tiles, GROUP]
    compressed_o_ptr,  # float32 [B, H, D_V]
    window_o_ptr, window_stats_ptr,  # float32 [B, H_KV, P_window, GROUP, D_V] and [B, H_KV, P_window, 2, GROUP]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, segments * SLOTS], where there is more than one segment
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    slots, J, tiles, num_parts, num_segments, scale_log2,
    COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, SUMMARIES: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, MERGERS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs choose blocks, merge columns of the parts, and attend the window."""
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    if role < num_segments:
        _choose(planes_ptr + row * (PLANES * GROUP) * J, maxima_ptr + row * tiles * GROUP,
                stats_ptr + row * num_parts * (2 * GROUP), bits_ptr, blocks_ptr, indices_ptr, row, role, num_segments,
                position, J, num_parts, GROUP, COMPRESS_SIZE, STRIDE, BLOCK_SIZE, SLOTS, BLOCK_SLOTS, INIT, LOCAL,
                PLANES, SUMMARIES, PARTS, BLOCKS)  # fmt: skip
    elif role < num_segments + MERGERS:
        first_column = (role - num_segments) * (BLOCK_V // MERGERS)
        _merge_columns(o_ptr, stats_ptr, compressed_o_ptr, row, num_parts, first_column,
                       GROUP, ROWS, D_V, BLOCK_V // MERGERS)  # fmt: skip
    else:
        part, window_parts = role - num_segments - MERGERS, tl.num_programs(0) - num_segments - MERGERS
        first, end = _visible_run(position, 1, 1, WINDOW)
        share = tl.cdiv(tl.cdiv(end - first, KEYS), window_parts) * KEYS
        lo = first + part * share
        q, _ = _load_queries(q_ptr, sequence, kv_head, H_KV, GROUP, ROWS, D_QK, BLOCK_QK)
        row_max, row_sum, acc = _attend_part(
            q, k_ptr, v_ptr, sequence, lo, tl.minimum(lo + share, end), slots, kv_head, scale_log2, None, None, row, J,
            tiles, H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, 1, 1, 0, PRECISION)  # fmt: skip
        out = row * window_parts + part
        _store_part(window_o_ptr, window_stats_ptr, out, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _merge_segments_kernel(
    positions_ptr,  # [B]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, M]
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    M, H_KV: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """One program chooses among the best of all segments of one sequence and KV head."""
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    if tl.load(positions_ptr + sequence) // BLOCK_SIZE >= SLOTS:
        i, row = tl.arange(0, CANDIDATES), wide(sequence) * H_KV + kv_head
        chosen = best(tl.load(bits_ptr + row * M + i, mask=i < M, other=-1), SLOTS)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(
            indices_ptr + row * SLOTS + place, tl.load(blocks_ptr + row * M + i, mask=chosen, other=0), mask=chosen
        )


@triton.jit
def _selected_kernel(
    q_ptr,  # [B, H, D_QK]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    gates_ptr,  # [B, H, 3]
    positions_ptr,  # [B]
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    compressed_o_ptr,  # float32 [B, H, D_V]
    window_o_ptr, window_stats_ptr,  # float32 [B, H_KV, P_window, GROUP, D_V] and [B, H_KV, P_window, 2, GROUP]
    out_ptr,  # [B, H, D_V]
    slots, window_parts, scale_log2, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to their chosen blocks and writes the gated sum."""
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    q, rows = _load_queries(q_ptr, sequence, kv_head, H_KV, GROUP, ROWS, D_QK, BLOCK_QK)
    slot = tl.arange(0, BLOCK_SLOTS)
    block = tl.load(indices_ptr + row * SLOTS + slot, mask=slot < SLOTS, other=-1)
    steps = tl.sum((block >= 0).to(tl.int32), 0) * (BLOCK_SIZE // KEYS)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in tl.range(0, steps):
        start = tl.load(indices_ptr + row * SLOTS + step // (BLOCK_SIZE // KEYS)) * BLOCK_SIZE
        token = start + step % (BLOCK_SIZE // KEYS) * KEYS + tl.arange(0, KEYS)
        k, v = _load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token <= position)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    selected = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    window = _merge_parts(window_o_ptr, window_stats_ptr, row * window_parts, window_parts,
                          GROUP, ROWS, D_V, 0, BLOCK_V, 4)  # fmt: skip
    out = selected * tl.load(gates_ptr + 3 * rows + 1).to(tl.float32)[:, None]
    out += load_rows(compressed_o_ptr, rows, D_V, BLOCK_V) * tl.load(gates_ptr + 3 * rows).to(tl.float32)[:, None]
    out += window * tl.load(gates_ptr + 3 * rows + 2).to(tl.float32)[:, None]
    store_rows(out_ptr, rows, tl.arange(0, ROWS) < GROUP, out, D_V, BLOCK_V)


class _Sizes(NamedTuple):
    """Shape and tile of one call."""

    B: int
    H_KV: int
    GROUP: int
    D_QK: int
    D_V: int
    keys: int  # of a tile

    @property
    def heads(self) -> tuple[int, ...]:
        """What every kernel takes: H_KV, GROUP, ROWS, D_QK, D_V and the padded widths."""
        return (self.H_KV, self.GROUP, padded(self.GROUP), self.D_QK, self.D_V, padded(self.D_QK), padded(self.D_V))

    def num_parts(self, most_keys: int, device: torch.device) -> int:
        """Programs that share the keys of one KV head: enough of them keep the chip busy."""
        wanted = _programs(device) // (self.B * self.H_KV)
        return max(1, min(wanted, triton.cdiv(most_keys, self.keys), _MAX_PARTS))

    def parts(self, num_parts: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where unfinished softmaxes go: sums, and their maximum and sum of weights."""
        shape = (self.B, self.H_KV, num_parts)
        o = like.new_empty(*shape, self.GROUP, self.D_V, dtype=torch.float32)
        return o, like.new_empty(*shape, 2, self.GROUP, dtype=torch.float32)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> _Sizes:
    (B, H, D_QK), H_KV, D_V = q.shape, k.shape[2], v.shape[3]
    row_bytes = padded(padded(D_QK) + padded(D_V)) * q.element_size()  # a power of two, as keys must be
    keys = max(16, min(64, _STAGE_BYTES // row_bytes))
    return _Sizes(B, H_KV, H // H_KV, D_QK, D_V, 4 if interpreted() else keys)


@functools.cache
def _programs(device: torch.device) -> int:
    if interpreted():
        return 4
    return _PROGRAMS_A_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _stages_alone(device: torch.device) -> int:
    """Steps that a program loads ahead which has a multiprocessor to itself."""
    return 6 if not interpreted() and torch.cuda.get_device_capability(device)[0] in (9, 10) else 3


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window_size: int | None, scale: float
) -> Tensor:
    """`decode.decode_dense_attention` of contiguous tensors."""
    sizes, slots = _sizes(q, k, v), k.shape[1]
    parts = sizes.num_parts(window_size or slots, q.device)
    o, stats = sizes.parts(parts, q)
    _parts_kernel[(parts, sizes.H_KV, sizes.B)](
        q, k, v, positions, o, stats, None, None, slots, 0, 0, scale * LOG2_E.value,
        1, 1, window_size or 0, *sizes.heads, sizes.keys, 1, 1, 0, dot_precision(q.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    out = q.new_empty(*q.shape[:2], sizes.D_V)
    columns = padded(sizes.D_V) // _MERGERS
    _merge_kernel[(_MERGERS, sizes.H_KV, sizes.B)](
        o, stats, out, parts, sizes.H_KV, sizes.GROUP, padded(sizes.GROUP), sizes.D_V, columns
    )
    return out


def sparse_attention(
    q: Tensor, gates: Tensor, cache: Sequence[Tensor], positions: Tensor, config: NSAConfig, scale: float
) -> NSAOutput:
    """`decode.decode_attention` of contiguous tensors; `cache` as a LayerCache."""
    k, v, sliding_k, sliding_v, summary_k, summary_v = cache
    sizes, precision, scale_log2 = _sizes(q, k, v), dot_precision(q.dtype), scale * LOG2_E.value
    B, H_KV, GROUP, _, D_V, keys = sizes
    l, d, size, n = (  # noqa: E741
        config.compress_block_size, config.compress_stride, config.select_block_size, config.num_selected_blocks,
    )  # fmt: skip
    J, R, SPAN = k.shape[1] // size, size // d, l // d
    planes, summaries = 1 + triton.cdiv(SPAN - 1, R), max(keys, R)
    tiles, blocks = triton.cdiv(J * R, summaries), min(_SEGMENT, padded(J))
    segments = triton.cdiv(J, blocks)
    parts = sizes.num_parts(J * R, q.device)
    window_parts = min(sizes.num_parts(config.window_size, q.device), _WINDOW_PARTS)

    (o, stats), (window_o, window_stats) = sizes.parts(parts, q), sizes.parts(window_parts, q)
    plane_sums = q.new_empty(B, H_KV, planes, GROUP, J, dtype=torch.float32)
    maxima = q.new_empty(B, H_KV, tiles, GROUP, dtype=torch.float32)
    _parts_kernel[(parts, H_KV, B)](
        q, summary_k, summary_v, positions, o, stats, plane_sums, maxima, summary_k.shape[1], J, tiles, scale_log2,
        l, d, 0, *sizes.heads, summaries, R, SPAN, planes, precision, num_warps=4, num_stages=3,
    )  # fmt: skip

    indices = positions.new_empty(B, H_KV, n, dtype=torch.int32)
    bits, candidates = (indices.new_empty(B, H_KV, segments * n if segments > 1 else 0) for _ in range(2))
    compressed_o = q.new_empty(B, H_KV * GROUP, D_V, dtype=torch.float32)
    _choose_kernel[(segments + _MERGERS + window_parts, H_KV, B)](
        q, sliding_k, sliding_v, positions, o, stats, plane_sums, maxima, compressed_o, window_o, window_stats,
        bits, candidates, indices, sliding_k.shape[1], J, tiles, parts, segments, scale_log2,
        l, d, size, config.window_size, n, padded(n), config.num_init_blocks, config.num_local_blocks,
        *sizes.heads, keys, summaries, planes, padded(parts), blocks, _MERGERS, precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    if segments > 1:
        _merge_segments_kernel[(H_KV, B)](
            positions, bits, candidates, indices, segments * n, H_KV, n, size, padded(segments * n)
        )

    out = q.new_empty(B, H_KV * GROUP, D_V)
    _selected_kernel[(H_KV, B)](
        q, k, v, gates, positions, indices, compressed_o, window_o, window_stats, out,
        k.shape[1], window_parts, scale_log2, n, padded(n), size, *sizes.heads, min(keys, size), precision,
        num_warps=4, num_stages=_stages_alone(q.device),
    )  # fmt: skip
    return NSAOutput(out, indices)


_STAGE_BYTES = 2**15
"""Keys and values that a step of a loop loads, three steps ahead: what fits the shared memory of every chip."""
_PROGRAMS_A_PROCESSOR = 4
"""Programs that share one multiprocessor while keys are read."""
_MAX_PARTS, _WINDOW_PARTS = 64, 4
"""Most parts of a run of keys, and of the window, which the last kernel merges on its way."""
_MERGERS = 4
"""Programs that share the columns of a merge."""
_SEGMENT = 1024
"""Blocks that a program ranks."""
