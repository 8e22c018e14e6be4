"""Attention of one new token of each sequence to its cache: four launches, or three where the cache is short.

    1. attend the summaries, divided over programs; keep what the importance of each block needs. Other programs append
       the new token, where that is still to be done, and attend the summary that it completes: a part of its own
    2. choose the blocks; meanwhile merge the compressed branch and attend the window
    3. attend the chosen blocks, divided over programs
    4. merge them and the window, and sum the branches by their gates

Of a short cache, where a launch costs more than what it does, every program of launch 3 chooses the blocks for itself,
others attend the window meanwhile, and launch 4 merges the compressed branch too.

A tile is the G query heads of one KV head: every key is read once for all of them. What a program computes depends on
the positions, which it reads itself; the grids depend on the cache's size alone, so a CUDA graph can replay them.

The importance of a block is a sum of exp(score - lse) over the heads of a group, and lse is known in launch 2 only.
Launch 1 therefore writes, a tile of keys at a time, the logarithms of the planes of `block_selection.py`, each where
the block stands that it counts for: launch 2 subtracts lse and sums the powers.

From Hopper on every launch starts early; the programs of launches 2 to 4 read their inputs before they wait, or attend
a window that holds the new token already.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.append_triton import append_head, pair_arguments
from nsa_kernels.block_selection import FORCED, best_soon
from nsa_kernels.decode_parts import (
    MERGERS,
    READING,
    Launch,
    Sizes,
    attend_part,
    load_keys,
    load_queries,
    merge_columns,
    merge_parts,
    sizes_of,
    store_part,
    visible_run,
)
from nsa_kernels.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.elementwise_triton import whole_rows
from nsa_kernels.geometry import NSAConfig, NSAOutput
from nsa_kernels.primitives import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    dot_precision,
    padded,
    softmax_step,
    store_rows,
    wide,
)
from nsa_kernels.summarise_triton import TILE_NUMBERS, advance_blocks, weight_arguments

# B sequences, S, W or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, n slots of
# chosen blocks, J selection blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.


@triton.jit
def _plane_weight(r, plane, R: tl.constexpr, SPAN: tl.constexpr):
    """Chunks of block j + plane that compression block j * R + r covers, float32."""
    return tl.maximum(tl.minimum(r + SPAN, (plane + 1) * R) - tl.maximum(r, plane * R), 0).to(tl.float32)


@triton.jit
def _importance(planes_ptr, stats_ptr, j, visible, J, num_parts, GROUP: tl.constexpr, R: tl.constexpr,
                SPAN: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr,
                HEADS: tl.constexpr, APPENDS: tl.constexpr):  # fmt: skip
    """Σ over the planes and heads of exp(log plane - lse), of blocks j; HEADS at a time.

    With APPENDS the last part is summary `visible` alone, or nothing, and in no plane. Planes are loaded after the
    statistics: Triton gives later loads their way, and a thread sums all heads of a block.
    """
    importance, part = tl.zeros([BLOCKS], tl.float32), tl.arange(0, PARTS)
    for first in tl.static_range(0, GROUP, HEADS):
        head = first + tl.arange(0, HEADS)
        exists, head = head < GROUP, tl.minimum(head, GROUP - 1)
        stats, known = stats_ptr + part[None, :] * 2 * GROUP + head[:, None], (part < num_parts)[None, :]
        part_max = tl.load(stats, mask=known, other=LOWEST)
        part_sum = tl.load(stats + GROUP, mask=known, other=0.0)
        row_max = tl.max(part_max, 1)
        lse = row_max + tl.log2(tl.sum(part_sum * tl.exp2(part_max - row_max[:, None]), 1))
        for plane in tl.static_range(PLANES):
            source = j - plane
            written = exists[:, None] & ((source >= 0) & (source * R < visible))[None, :]
            rows = (plane * GROUP + head).to(tl.int64)[:, None] * J
            log = tl.load(planes_ptr + rows + j[None, :])  # whole rows, also what is not written
            importance += tl.sum(tl.exp2(tl.where(written, log - lse[:, None], LOWEST)), 0)
        if APPENDS:
            latest = tl.load(stats_ptr + (num_parts - 1) * (2 * GROUP) + head)
            p = tl.sum(tl.where(exists, tl.exp2(latest - lse), 0.0), 0)
            for plane in tl.static_range(PLANES):
                weight = _plane_weight(visible % R, plane, R, SPAN)
                importance += tl.where(j == visible // R + plane, weight * p, 0.0)
    return importance


@triton.jit
def _completes_block(position, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Whether the token is the last of a compression block."""
    return (position + 1 >= COMPRESS_SIZE) & ((position + 1 - COMPRESS_SIZE) % STRIDE == 0)


@triton.jit
def _older_summaries(position, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, APPENDS: tl.constexpr):
    """Summaries that a token sees; with APPENDS without the one that it completes."""
    _, visible = visible_run(position, COMPRESS_SIZE, STRIDE, 0)
    return visible - _completes_block(position, COMPRESS_SIZE, STRIDE).to(tl.int32) if APPENDS else visible


@triton.jit
def _advance_side(
    side: tl.constexpr, new, started, weights, cos_ptr, sin_ptr, block_cos_ptr, block_sin_ptr, position, sequence,
    kv_head, LAST: tl.constexpr, ROTATE: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    L: tl.constexpr, STRIDE: tl.constexpr, H_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    M: tl.constexpr, BLOCK_M: tl.constexpr, COMPRESSION: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """`advance_blocks` of the keys (side 0) or values (side 1) of one KV head, pair LAST of the new ones."""
    slot = (sequence * new[4][LAST] + position % new[4][LAST]) * H_KV + kv_head
    state, rows = sequence * (L // STRIDE * H_KV) + kv_head, wide(kv_head) * (L * D)
    own = (None, None, None, None, None)
    if COMPRESSION == "linear":
        own = (weights[0][side] + rows, weights[1][side] + rows * M, weights[2][side] + kv_head * M, None, None)
    if COMPRESSION == "mlp":
        own = (weights[0][side] + rows, weights[1][side] + rows * M, weights[2][side] + kv_head * M,
               weights[3][side] + kv_head * (M * D), weights[4][side] + kv_head * D)  # fmt: skip
    return advance_blocks(
        new[side][LAST] + sequence * new[5 + side][LAST] + kv_head * D, new[2 + side][LAST] + slot * D,
        started[side] + state * D, started[2 + side] + state * M, own, cos_ptr, sin_ptr, block_cos_ptr, block_sin_ptr,
        position, ROTATE, HALF, BLOCK_HALF, L, STRIDE, H_KV, D, BLOCK_D, M, BLOCK_M, COMPRESSION,
        NUMBERS)  # fmt: skip


@triton.jit
def _summaries_kernel(
    q_ptr,  # [B, H, D_QK], sequences being `q_stride` apart
    cos_ptr, sin_ptr,  # [B, HALF]
    block_cos_ptr, block_sin_ptr,  # [B, BLOCK_HALF]
    k_ptr, v_ptr,  # [B, slots, H_KV, D], summaries
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP]
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    new,  # as `append_triton.pair_arguments` gives them, the compressed branch last
    started,  # tuple of a StartedBlocks, float32 [B, S, H_KV, D or M]
    weights,  # five pairs as `weight_arguments` gives them
    q_stride, slots, num_parts, J, scale_log2,
    ROTATE: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
    COMPRESSION: tl.constexpr, NUMBERS: tl.constexpr, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs attend their share of the summaries, or append a branch's new token."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)  # which reads queries and gates at once
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), wide(tl.program_id(2))
    position, row = tl.load(positions_ptr + sequence), sequence * H_KV + kv_head
    APPENDS: tl.constexpr = len(ROTATE) > 0
    LAST: tl.constexpr = len(ROTATE) - 1
    old_parts = num_parts - 1 if APPENDS else num_parts
    if role < old_parts:
        end = _older_summaries(position, COMPRESS_SIZE, STRIDE, APPENDS)
        share = tl.cdiv(tl.cdiv(end, KEYS), old_parts) * KEYS
        q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
        row_max, row_sum, acc = attend_part(
            q, k_ptr, v_ptr, sequence, role * share, tl.minimum(role * share + share, end), slots, kv_head, scale_log2,
            planes_ptr, row, J, H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, R, SPAN, PLANES,
            PRECISION)  # fmt: skip
        store_part(o_ptr, stats_ptr, row * num_parts + role, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)
    if APPENDS:
        ended, head = _completes_block(position, COMPRESS_SIZE, STRIDE), tl.arange(0, ROWS)
        target = (sequence * slots + tl.maximum(position + 1 - COMPRESS_SIZE, 0) // STRIDE) * H_KV + kv_head
        own_cos_ptr, own_sin_ptr = cos_ptr + sequence * HALF, sin_ptr + sequence * HALF
        newest = row * num_parts + old_parts
        if BLOCK_HALF > 0:
            block_cos_ptr += sequence * BLOCK_HALF
            block_sin_ptr += sequence * BLOCK_HALF
        if role == old_parts:
            column = tl.arange(0, BLOCK_QK)
            k = _advance_side(0, new, started, weights, own_cos_ptr, own_sin_ptr, block_cos_ptr, block_sin_ptr,
                              position, sequence, kv_head, LAST, ROTATE[LAST], HALF, BLOCK_HALF, COMPRESS_SIZE, STRIDE,
                              H_KV, D_QK, BLOCK_QK, M[0], BLOCK_M[0], COMPRESSION, NUMBERS)  # fmt: skip
            tl.store(k_ptr + target * D_QK + column, k, mask=ended & (column < D_QK))
            q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
            score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale_log2
            stats = stats_ptr + newest * 2 * GROUP + head
            tl.store(stats, tl.where(ended, score, LOWEST), mask=head < GROUP)
            tl.store(stats + GROUP, tl.where(ended & (head >= 0), 1.0, 0.0), mask=head < GROUP)
        if role == num_parts:
            column = tl.arange(0, BLOCK_V)
            v = _advance_side(1, new, started, weights, own_cos_ptr, own_sin_ptr, None, None, position, sequence,
                              kv_head, LAST, False, 0, 0, COMPRESS_SIZE, STRIDE, H_KV, D_V, BLOCK_V, M[1], BLOCK_M[1],
                              COMPRESSION, NUMBERS)  # fmt: skip
            tl.store(v_ptr + target * D_V + column, v, mask=ended & (column < D_V))
            o = tl.where(ended & (head >= 0)[:, None], v.to(tl.float32)[None, :], 0.0)
            store_rows(o_ptr, newest * GROUP + head, head < GROUP, o, D_V, BLOCK_V)
        for i in tl.static_range(len(ROTATE) - 1):
            if role == num_parts + 1 + i:
                append_head(new[0][i], new[1][i], new[2][i], new[3][i], new[4][i], new[5][i], new[6][i],
                            own_cos_ptr, own_sin_ptr, position, sequence, kv_head, ROTATE[i], H_KV, HALF, D_QK, D_V,
                            BLOCK_QK, BLOCK_V)  # fmt: skip


@triton.jit
def _choose(
    planes_ptr, stats_ptr, bits_ptr, blocks_ptr, indices_ptr, row, segment, num_segments, position, J, num_parts,
    GROUP: tl.constexpr, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, PROBES: tl.constexpr, APPENDS: tl.constexpr,
):  # fmt: skip
    """Choose among the blocks of a segment of one sequence and KV head; where it is the only one, for good."""
    own, slot = position // BLOCK_SIZE, tl.arange(0, BLOCK_SLOTS)
    if own < SLOTS:
        chosen_all = tl.where(slot <= own, slot, -1)
        tl.store(indices_ptr + row * SLOTS + slot, chosen_all, mask=(slot < SLOTS) & (segment == 0))
    else:
        visible = _older_summaries(position, COMPRESS_SIZE, STRIDE, APPENDS)
        j = segment * BLOCKS + tl.arange(0, BLOCKS)
        importance = _importance(planes_ptr, stats_ptr, j, visible, J, num_parts, GROUP, BLOCK_SIZE // STRIDE,
                                 COMPRESS_SIZE // STRIDE, PLANES, PARTS, BLOCKS, HEADS, APPENDS)  # fmt: skip
        forced = (j < INIT) | (j > own - LOCAL)
        bits = tl.minimum(tl.maximum(importance.to(tl.int32, bitcast=True), 0), FORCED - 1)
        bits = tl.where(j <= own, tl.where(forced, FORCED, bits), -1)
        chosen, place = best_soon(bits, SLOTS, PROBES)
        if num_segments == 1:
            tl.store(indices_ptr + row * SLOTS + place, j, mask=chosen)
        else:
            out = (row * num_segments + segment) * SLOTS
            tl.store(bits_ptr + out + slot, tl.full([BLOCK_SLOTS], -1, tl.int32), mask=slot < SLOTS)
            tl.debug_barrier()
            tl.store(bits_ptr + out + place, bits, mask=chosen)
            tl.store(blocks_ptr + out + place, j, mask=chosen)


@triton.jit
def _attend_window(
    q_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, o_ptr, stats_ptr, part, num_parts, position, sequence, kv_head,
    q_stride, slots, scale_log2, WINDOW: tl.constexpr, HALF: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Attend one part of the window of one KV head, after the launch before if WAIT."""
    first, end = visible_run(position, 1, 1, WINDOW)
    share = tl.cdiv(tl.cdiv(end - first, KEYS), num_parts) * KEYS
    lo, row = first + part * share, wide(sequence) * H_KV + kv_head
    q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
    await_launch_before(WAIT)
    row_max, row_sum, acc = attend_part(
        q, k_ptr, v_ptr, sequence, lo, tl.minimum(lo + share, end), slots, kv_head, scale_log2, None, row, 0,
        H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, 1, 1, 0, PRECISION)  # fmt: skip
    store_part(o_ptr, stats_ptr, row * num_parts + part, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _choose_kernel(
    q_ptr,  # [B, H, D_QK], sequences being `q_stride` apart
    cos_ptr, sin_ptr,  # [B, HALF]
    k_ptr, v_ptr,  # [B, slots, H_KV, D], of the sliding branch
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the compressed branch
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    compressed_o_ptr,  # float32 [B, H, D_V]
    window_o_ptr, window_stats_ptr,  # float32 [B, H_KV, P_window, GROUP, D_V] and [B, H_KV, P_window, 2, GROUP]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, segments * SLOTS], where there is more than one segment
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    q_stride, slots, J, num_parts, num_segments, scale_log2, HALF: tl.constexpr,
    COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PLANES: tl.constexpr, PARTS: tl.constexpr,
    BLOCKS: tl.constexpr, HEADS: tl.constexpr, PROBES: tl.constexpr, MERGERS: tl.constexpr,
    PRECISION: tl.constexpr, APPENDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs choose blocks, merge columns of the parts, and attend the window."""
    let_next_begin(EARLY)
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    if role < num_segments:
        await_launch_before(EARLY)
        _choose(planes_ptr + row * (PLANES * GROUP) * J, stats_ptr + row * num_parts * (2 * GROUP), bits_ptr,
                blocks_ptr, indices_ptr, row, role, num_segments, position, J, num_parts, GROUP, COMPRESS_SIZE, STRIDE,
                BLOCK_SIZE, SLOTS, BLOCK_SLOTS, INIT, LOCAL, PLANES, PARTS, BLOCKS, HEADS, PROBES,
                APPENDS)  # fmt: skip
    elif role < num_segments + MERGERS:
        await_launch_before(EARLY)
        first_column = (role - num_segments) * (BLOCK_V // MERGERS)
        AT_ONCE: tl.constexpr = 16 if PARTS > 32 else 8  # so many parts are there only if rows are few
        merge_columns(o_ptr, stats_ptr, compressed_o_ptr, row, num_parts, first_column,
                      GROUP, ROWS, D_V, BLOCK_V // MERGERS, AT_ONCE)  # fmt: skip
    else:
        part, window_parts = role - num_segments - MERGERS, tl.num_programs(0) - num_segments - MERGERS
        _attend_window(q_ptr, cos_ptr, sin_ptr, k_ptr, v_ptr, window_o_ptr, window_stats_ptr, part, window_parts,
                       position, sequence, kv_head, q_stride, slots, scale_log2, WINDOW, HALF, H_KV, GROUP, ROWS,
                       D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, PRECISION, EARLY and APPENDS)  # fmt: skip


@triton.jit
def _merge_segments_kernel(
    positions_ptr,  # [B]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, M]
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    M, H_KV: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, CANDIDATES: tl.constexpr,
    PROBES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program chooses among the best of all segments of one sequence and KV head."""
    let_next_begin(EARLY)
    await_launch_before(EARLY)
    kv_head, sequence = tl.program_id(0), tl.program_id(1)
    if tl.load(positions_ptr + sequence) // BLOCK_SIZE >= SLOTS:
        i, row = tl.arange(0, CANDIDATES), wide(sequence) * H_KV + kv_head
        chosen, place = best_soon(tl.load(bits_ptr + row * M + i, mask=i < M, other=-1), SLOTS, PROBES)
        tl.store(
            indices_ptr + row * SLOTS + place, tl.load(blocks_ptr + row * M + i, mask=chosen, other=0), mask=chosen
        )


@triton.jit
def _attend_chosen(
    q, k_ptr, v_ptr, indices_ptr, o_ptr, stats_ptr, part, num_parts, position, sequence, kv_head, slots, scale_log2,
    SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend one part of the chosen blocks of one KV head."""
    STEPS: tl.constexpr = BLOCK_SIZE // KEYS  # for each block
    steps = tl.minimum(position // BLOCK_SIZE + 1, SLOTS) * STEPS
    share = tl.cdiv(steps, num_parts)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in tl.range(part * share, tl.minimum(part * share + share, steps)):
        start = tl.load(indices_ptr + step // STEPS) * BLOCK_SIZE
        token = start + step % STEPS * KEYS + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token <= position)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    out = (wide(sequence) * H_KV + kv_head) * num_parts + part
    store_part(o_ptr, stats_ptr, out, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _selected_kernel(
    q_ptr,  # [B, H, D_QK], sequences being `q_stride` apart
    cos_ptr, sin_ptr,  # [B, HALF]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    positions_ptr,  # [B]
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP]
    q_stride, slots, scale_log2, HALF: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to its share of their chosen blocks."""
    let_next_begin(EARLY)
    part, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
    await_launch_before(EARLY)
    _attend_chosen(q, k_ptr, v_ptr, indices_ptr + row * SLOTS, o_ptr, stats_ptr, part, tl.num_programs(0), position,
                   sequence, kv_head, slots, scale_log2, SLOTS, BLOCK_SIZE, H_KV, GROUP, ROWS, D_QK, D_V,
                   BLOCK_QK, BLOCK_V, KEYS, PRECISION)  # fmt: skip


@triton.jit
def _choose_and_attend_kernel(
    q_ptr,  # [B, H, D_QK], sequences being `q_stride` apart
    cos_ptr, sin_ptr,  # [B, HALF]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    sliding_k_ptr, sliding_v_ptr,  # [B, sliding_slots, H_KV, D]
    positions_ptr,  # [B]
    stats_ptr, planes_ptr,  # float32 [B, H_KV, P, 2, GROUP] and [B, H_KV, PLANES, GROUP, BLOCKS], of the summaries
    indices_ptr,  # int32 [B, H_KV, P_selected, SLOTS], the same for every part
    o_ptr, part_stats_ptr,  # float32 [B, H_KV, P_selected, GROUP, D_V] and [B, H_KV, P_selected, 2, GROUP]
    window_o_ptr, window_stats_ptr,  # the same of P_window parts
    q_stride, slots, sliding_slots, num_parts, selected_parts, scale_log2, HALF: tl.constexpr,
    COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, CHOSEN: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, PROBES: tl.constexpr,
    PRECISION: tl.constexpr, APPENDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs choose blocks and attend their share of them, or attend the window.

    KEYS tokens of the window are a step, and CHOSEN ones of a block.
    """
    let_next_begin(EARLY)
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    if role < selected_parts:
        q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
        await_launch_before(EARLY)
        own = row * selected_parts + role
        _choose(planes_ptr + row * (PLANES * GROUP) * BLOCKS, stats_ptr + row * num_parts * (2 * GROUP), None, None,
                indices_ptr, own, 0, 1, position, BLOCKS, num_parts, GROUP, COMPRESS_SIZE, STRIDE,
                BLOCK_SIZE, SLOTS, BLOCK_SLOTS, INIT, LOCAL, PLANES, PARTS, BLOCKS, HEADS, PROBES,
                APPENDS)  # fmt: skip
        tl.debug_barrier()
        _attend_chosen(q, k_ptr, v_ptr, indices_ptr + own * SLOTS, o_ptr, part_stats_ptr, role, selected_parts,
                       position, sequence, kv_head, slots, scale_log2, SLOTS, BLOCK_SIZE, H_KV, GROUP, ROWS,
                       D_QK, D_V, BLOCK_QK, BLOCK_V, CHOSEN, PRECISION)  # fmt: skip
    else:
        _attend_window(q_ptr, cos_ptr, sin_ptr, sliding_k_ptr, sliding_v_ptr, window_o_ptr, window_stats_ptr,
                       role - selected_parts, tl.num_programs(0) - selected_parts, position, sequence, kv_head,
                       q_stride, sliding_slots, scale_log2, WINDOW, HALF, H_KV, GROUP, ROWS, D_QK, D_V,
                       BLOCK_QK, BLOCK_V, KEYS, PRECISION, EARLY and APPENDS)  # fmt: skip


@triton.jit
def _gate(pointers, LOGITS: tl.constexpr):
    """Gates of one branch, float32, of their logits if they are LOGITS."""
    gates = tl.load(pointers).to(tl.float32)
    return tl.sigmoid(gates) if LOGITS else gates


@triton.jit
def _gated_sum_kernel(
    gates_ptr,  # [B, H, 3], sequences being `gates_stride` apart
    compressed_o_ptr, compressed_stats_ptr,  # float32 [B, H, D_V] and None, or the same as the next
    selected_o_ptr, selected_stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP]
    window_o_ptr, window_stats_ptr,  # the same of P_window parts
    out_ptr,  # [B, H, D_V]
    gates_stride, summary_parts, selected_parts, window_parts,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_V: tl.constexpr, COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr, MERGED: tl.constexpr, LOGITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program merges some columns of the parts of one KV head and sums the branches by their gates.

    The compressed branch is MERGED already, or is merged as the others.
    """
    kv_head, sequence = tl.program_id(1), wide(tl.program_id(2))
    first, row = tl.program_id(0) * COLUMNS, sequence * H_KV + kv_head
    head, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    own = tl.minimum(head, GROUP - 1)
    gates, heads = gates_ptr + sequence * gates_stride + 3 * (kv_head * GROUP + own), row * GROUP + own
    compressed, selected, sliding = _gate(gates, LOGITS), _gate(gates + 1, LOGITS), _gate(gates + 2, LOGITS)
    await_launch_before(EARLY)
    at, mask = heads[:, None] * D_V + column[None, :], (head < GROUP)[:, None] & (column < D_V)[None, :]
    if MERGED:
        out = tl.load(compressed_o_ptr + at, mask=mask, other=0.0) * compressed[:, None]
    else:
        out = compressed[:, None] * merge_parts(
            compressed_o_ptr, compressed_stats_ptr, row * summary_parts, summary_parts,
            GROUP, ROWS, D_V, first, COLUMNS, AT_ONCE)  # fmt: skip
    out += selected[:, None] * merge_parts(
        selected_o_ptr, selected_stats_ptr, row * selected_parts, selected_parts,
        GROUP, ROWS, D_V, first, COLUMNS, AT_ONCE)  # fmt: skip
    out += sliding[:, None] * merge_parts(
        window_o_ptr, window_stats_ptr, row * window_parts, window_parts,
        GROUP, ROWS, D_V, first, COLUMNS, AT_ONCE)  # fmt: skip
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


class _Call(NamedTuple):
    """What the launches of one call share."""

    queries: tuple[Any, ...]
    """q, and the cosines and sines that it is still to be rotated by, or None."""
    cache: Sequence[Tensor]
    positions: Tensor
    config: NSAConfig
    sizes: Sizes
    half: int
    """Pairs of dimensions of a query that are still to be rotated."""
    blocks: int
    """Blocks that a program ranks."""
    scale_log2: float
    precision: str
    appends: bool
    """Whether the first launch appends the new tokens."""

    @property
    def reading(self) -> Launch:
        """How a run of keys is read."""
        wide_keys = (self.sizes.D_QK + self.sizes.D_V) * self.cache[0].element_size() > _NARROW_BYTES
        return _READING_WIDE if wide_keys else READING

    @property
    def geometry(self) -> tuple[int, ...]:
        """COMPRESS_SIZE to LOCAL of a kernel that chooses."""
        c = self.config
        return (
            c.compress_block_size, c.compress_stride, c.select_block_size, c.window_size, c.num_selected_blocks,
            padded(c.num_selected_blocks), c.num_init_blocks, c.num_local_blocks,
        )  # fmt: skip

    @property
    def planes(self) -> int:
        """Blocks that a compression block reaches into at most."""
        c = self.config
        return 1 + triton.cdiv(c.compress_block_size // c.compress_stride - 1, c.select_block_size // c.compress_stride)

    @property
    def window_parts(self) -> int:
        """Programs that share the window of one KV head."""
        most = self.sizes.num_parts(self.config.window_size, self.reading, self.positions.device)
        return min(most, _WINDOW_PARTS)

    def choosing(self, warps: int) -> tuple[int, int]:
        """Blocks that a program ranks, and heads whose planes it sums at a time."""
        heads = triton.next_power_of_2(self.sizes.GROUP)
        return self.blocks, min(heads, max(1, _PLANE_NUMBERS * warps // self.blocks))


def sparse_attention(
    q: Tensor,
    gates: Tensor,
    gate_logits: bool,
    cache: Sequence[Tensor],
    positions: Tensor,
    config: NSAConfig,
    scale: float,
    new: Any,
) -> NSAOutput:
    """`decode.decode_attention` of contiguous tensors, `q` and `gates` aside; `cache` as a LayerCache."""
    q, gates = whole_rows(q), whole_rows(gates)
    sizes = sizes_of(q, cache[0], cache[1])
    cos, sin = (None, None) if new is None else (x.contiguous() for x in new.rotary)
    J = cache[0].shape[1] // config.select_block_size
    call = _Call(
        (q, cos, sin), cache, positions, config, sizes, 0 if cos is None else cos.shape[1],
        min(_SEGMENT, padded(J)), scale * LOG2_E.value, dot_precision(q.dtype), new is not None,
    )  # fmt: skip
    summaries, plane_logs = _attend_summaries(call, new)
    attend = _attend_at_once if call.blocks >= J and call.blocks <= _SHORT else _attend_in_turn
    compressed, selected, window, indices = attend(call, summaries, plane_logs)

    B, H_KV, GROUP, _, D_V, _ = sizes
    (early, overlap), rows = early_start(q.device), triton.next_power_of_2(GROUP)
    out = q.new_empty(B, H_KV * GROUP, D_V)
    num_parts = tuple(1 if x.stats is None else x.o.shape[2] for x in (compressed, selected, window))
    at_once = min(triton.next_power_of_2(num_parts[1]), max(1, _MERGED_ROWS // rows))
    _gated_sum_kernel[(padded(D_V) // _COLUMNS, H_KV, B)](
        gates, *compressed, *selected, *window, out, gates.stride(0), *num_parts,
        H_KV, GROUP, rows, D_V, _COLUMNS, at_once, compressed.stats is None, gate_logits, early, **overlap,
    )  # fmt: skip
    return NSAOutput(out, indices)


class _Branch(NamedTuple):
    """What was attended of a branch: in parts, or without statistics merged."""

    o: Tensor  # float32 [B, H_kv, P, G, D_v], or [B, H, D_v]
    stats: Tensor | None  # float32 [B, H_kv, P, 2, G]


def _attend_summaries(call: _Call, new: Any) -> tuple[_Branch, Tensor]:
    """Launch 1: the compressed branch in parts, the last of them the summary that a new token completes; its planes."""
    (q, cos, sin), summary_k, summary_v, config = call.queries, *call.cache[4:], call.config
    sizes, (early, overlap) = call.sizes, early_start(q.device)
    R, SPAN = config.select_block_size // config.compress_stride, config.compress_block_size // config.compress_stride
    J = call.cache[0].shape[1] // config.select_block_size
    parts, row = sizes.num_parts(J * R, call.reading, q.device), triton.cdiv(J, call.blocks) * call.blocks
    programs, started, block_cos, block_sin = parts, (), None, None
    (*tokens, rotates), (weights, *learned) = pair_arguments(()), weight_arguments(None)
    if new is not None:
        *tokens, rotates = pair_arguments([*new.branches, new.compressed])
        weights, *learned = weight_arguments(new.weights)
        parts, programs, started = parts + 1, parts + 2 + len(new.branches), tuple(new.started)
        if new.block_rotary is not None:
            block_cos, block_sin = (x.contiguous() for x in new.block_rotary)
    plane_logs = q.new_empty(sizes.B, sizes.H_KV, call.planes, sizes.GROUP, row, dtype=torch.float32)
    branch = _Branch(*sizes.parts(parts, q))
    _summaries_kernel[(programs, sizes.H_KV, sizes.B)](
        q, cos, sin, block_cos, block_sin, summary_k, summary_v, call.positions, *branch, plane_logs,
        tuple(tokens), started, weights, q.stride(0), summary_k.shape[1], parts, row, call.scale_log2,
        rotates, call.half, 0 if block_cos is None else block_cos.shape[1], *learned, TILE_NUMBERS,
        config.compress_block_size, config.compress_stride, *sizes.heads, max(sizes.keys, R), R, SPAN, call.planes,
        call.precision, early, **call.reading.options, **overlap,
    )  # fmt: skip
    return branch, plane_logs


def _attend_in_turn(call: _Call, summaries: _Branch, plane_logs: Tensor) -> tuple[_Branch, _Branch, _Branch, Tensor]:
    """Launches 2 and 3: the branches, and the chosen blocks."""
    (q, cos, sin), (k, v, sliding_k, sliding_v, *_), sizes = call.queries, call.cache, call.sizes
    B, H_KV, GROUP, _, D_V, keys = sizes
    config, positions, (early, overlap) = call.config, call.positions, early_start(q.device)
    n, size = config.num_selected_blocks, config.select_block_size
    row, parts = plane_logs.shape[-1], summaries.o.shape[2]
    segments = row // call.blocks
    indices = positions.new_empty(B, H_KV, n, dtype=torch.int32)
    bits, candidates = (indices.new_empty(B, H_KV, segments * n if segments > 1 else 0) for _ in range(2))
    compressed_o = q.new_empty(B, H_KV * GROUP, D_V, dtype=torch.float32)
    window = _Branch(*sizes.parts(call.window_parts, q))
    warps = max(4, call.blocks // _BLOCKS_A_WARP)
    _choose_kernel[(segments + MERGERS + call.window_parts, H_KV, B)](
        q, cos, sin, sliding_k, sliding_v, positions, *summaries, plane_logs, compressed_o, *window,
        bits, candidates, indices, q.stride(0), sliding_k.shape[1], row, parts, segments, call.scale_log2,
        call.half, *call.geometry, *sizes.heads, keys, call.planes, padded(parts), *call.choosing(warps), _PROBES,
        MERGERS, call.precision, call.appends, early, num_warps=warps, num_stages=3, **overlap,
    )  # fmt: skip
    if segments > 1:
        _merge_segments_kernel[(H_KV, B)](
            positions, bits, candidates, indices, segments * n, H_KV, n, size, padded(segments * n), _PROBES, early,
            **overlap,
        )  # fmt: skip

    selected = _Branch(*sizes.parts(sizes.num_parts(n * size, _SELECTED, q.device), q))
    _selected_kernel[(selected.o.shape[2], H_KV, B)](
        q, cos, sin, k, v, positions, indices, *selected, q.stride(0), k.shape[1], call.scale_log2,
        call.half, n, size, *sizes.heads, min(keys, size), call.precision, early, **_SELECTED.options, **overlap,
    )  # fmt: skip
    return _Branch(compressed_o, None), selected, window, indices


def _attend_at_once(call: _Call, summaries: _Branch, plane_logs: Tensor) -> tuple[_Branch, _Branch, _Branch, Tensor]:
    """Launches 2 and 3 in one, of a short cache."""
    (q, cos, sin), (k, v, sliding_k, sliding_v, *_), sizes = call.queries, call.cache, call.sizes
    config, positions, (early, overlap) = call.config, call.positions, early_start(q.device)
    n, size, parts = config.num_selected_blocks, config.select_block_size, summaries.o.shape[2]
    selected = _Branch(*sizes.parts(sizes.num_parts(n * size, _CHOOSING, q.device), q))
    window = _Branch(*sizes.parts(call.window_parts, q))
    selected_parts = selected.o.shape[2]
    indices = positions.new_empty(sizes.B, sizes.H_KV, selected_parts, n, dtype=torch.int32)
    _choose_and_attend_kernel[(selected_parts + call.window_parts, sizes.H_KV, sizes.B)](
        q, cos, sin, k, v, sliding_k, sliding_v, positions, summaries.stats, plane_logs, indices, *selected, *window,
        q.stride(0), k.shape[1], sliding_k.shape[1], parts, selected_parts, call.scale_log2,
        call.half, *call.geometry, *sizes.heads, sizes.keys, min(sizes.keys, size), call.planes, padded(parts),
        *call.choosing(_CHOOSING.num_warps), _PROBES, call.precision, call.appends, early,
        **_CHOOSING.options, **overlap,
    )  # fmt: skip
    return summaries, selected, window, indices[:, :, 0]


_NARROW_BYTES, _READING_WIDE = 256, Launch(num_stages=2, programs=3)
"""Summaries of more bytes, key and value together, are read by as many programs as a multiprocessor has room for."""
_SELECTED = Launch()
"""Of the kernel that reads the chosen blocks."""
_CHOOSING = Launch(programs=2)
"""Of the kernel that chooses them too: what every program does alone is done less often."""
_BLOCKS_A_WARP = 128
"""Blocks that each warp ranks, if they are many."""
_PROBES = 4
"""Bounds that are tried at a time."""
_PLANE_NUMBERS = 2048
"""Numbers of a plane that each warp holds."""
_COLUMNS, _MERGED_ROWS = 16, 256
"""Columns that a program of the last launch merges, and most rows of parts that it loads at a time."""
_WINDOW_PARTS = 4
"""Most parts of the window."""
_SEGMENT = 1024
"""Blocks that a program ranks."""
_SHORT = 128
"""Most blocks that every program of launch 3 chooses from for itself."""
