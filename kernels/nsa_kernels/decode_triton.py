"""Attention of one new token of each sequence to its cache: four launches, whatever the lengths.

    1. attend the summaries, divided over programs; keep what the importance of each block needs. Other programs append
       the new token, where that is still to be done, carry the summaries on (`summarise_triton.py`), and attend the one
       that the token completes: a part of its own
    2. choose the blocks, and merge the compressed branch: small programs of few warps, which wait for each other least
    3. attend the window, divided over programs, while the blocks are chosen; then those, divided too
    4. merge them and the window, and sum the branches by their gates

A tile is the G query heads of one KV head: every key is read once for all of them. What a program computes depends on
the positions, which it reads itself; the grids depend on the cache's size alone, so a CUDA graph can replay them.

The importance of a block is a sum of exp(score - lse) over the heads of a group, and lse is known in launch 2 only.
Launch 1 therefore writes, a tile of keys at a time, the logarithms of the planes of `block_selection.py`, each where
the block stands that it counts for: launch 2 subtracts lse and sums the powers.

From Hopper on every launch starts early. Launch 2 lets the third begin only when the first has ended: the window then
holds the new token. The programs of launches 3 and 4 read their inputs before they wait.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.append_triton import append_head, pair_arguments
from nsa_kernels.block_selection import FORCED, best_soon
from nsa_kernels.decode_parts import (
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
from nsa_kernels.summarise_triton import TILE_NUMBERS, advance_block, weight_arguments

# B sequences, S, W or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, n slots of
# chosen blocks, J selection blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.


@triton.jit
def _plane_weight(r, plane, R: tl.constexpr, SPAN: tl.constexpr):
    """Chunks of block j + plane that compression block j * R + r covers, float32."""
    return tl.maximum(tl.minimum(r + SPAN, (plane + 1) * R) - tl.maximum(r, plane * R), 0).to(tl.float32)


@triton.jit
def _importance(planes_ptr, stats_ptr, j, visible, J, num_parts, GROUP: tl.constexpr, R: tl.constexpr,
                SPAN: tl.constexpr, PLANES: tl.constexpr, BLOCK_PLANES: tl.constexpr, PARTS: tl.constexpr,
                BLOCKS: tl.constexpr, HEADS: tl.constexpr, APPENDS: tl.constexpr):  # fmt: skip
    """Σ over the planes and heads of exp(log plane - lse), of blocks j; HEADS at a time.

    With APPENDS the last part is summary `visible` alone, or nothing, and in no plane. All loads come first: none waits
    for what is computed of another.
    """
    importance, part, plane = tl.zeros([BLOCKS], tl.float32), tl.arange(0, PARTS), tl.arange(0, BLOCK_PLANES)
    source = j[None, :] - plane[:, None]
    written = (plane < PLANES)[:, None] & (source >= 0) & (source * R < visible)
    for first in tl.static_range(0, GROUP, HEADS):
        head = first + tl.arange(0, HEADS)
        exists, head = head < GROUP, tl.minimum(head, GROUP - 1)
        rows = (tl.minimum(plane, PLANES - 1)[:, None] * GROUP + head[None, :]).to(tl.int64) * J
        log = tl.load(planes_ptr + rows[:, :, None] + j[None, None, :])  # whole rows, also what is not written
        latest = tl.load(stats_ptr + (num_parts - 1) * (2 * GROUP) + head)
        stats, known = stats_ptr + part[None, :] * 2 * GROUP + head[:, None], (part < num_parts)[None, :]
        part_max = tl.load(stats, mask=known, other=LOWEST)
        part_sum = tl.load(stats + GROUP, mask=known, other=0.0)
        tl.debug_barrier()  # no load moves past it
        row_max = tl.max(part_max, 1)
        lse = row_max + tl.log2(tl.sum(part_sum * tl.exp2(part_max - row_max[:, None]), 1))
        log = tl.where(written[:, None, :] & exists[None, :, None], log - lse[None, :, None], LOWEST)
        importance += tl.sum(tl.sum(tl.exp2(log), 1), 0)
        if APPENDS:
            p = tl.sum(tl.where(exists, tl.exp2(latest - lse), 0.0), 0)
            for m in tl.static_range(PLANES):
                weight = _plane_weight(visible % R, m, R, SPAN)
                importance += tl.where(j == visible // R + m, weight * p, 0.0)
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
    side: tl.constexpr, s, new, started, weights, cos_ptr, sin_ptr, block_cos_ptr, block_sin_ptr, position, sequence,
    kv_head, LAST: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, L: tl.constexpr, STRIDE: tl.constexpr,
    H_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, BLOCK_M: tl.constexpr,
    COMPRESSION: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """`advance_block` of the keys (side 0) or values (side 1) of one KV head, pair LAST of the new ones."""
    slot = (sequence * new[4][LAST] + position % new[4][LAST]) * H_KV + kv_head
    state, rows = sequence * (L // STRIDE * H_KV) + kv_head, wide(kv_head) * (L * D)
    own = (None, None, None, None, None)
    if COMPRESSION == "linear":
        own = (weights[0][side] + rows, weights[1][side] + rows * M, weights[2][side] + kv_head * M, None, None)
    if COMPRESSION == "mlp":
        own = (weights[0][side] + rows, weights[1][side] + rows * M, weights[2][side] + kv_head * M,
               weights[3][side] + kv_head * (M * D), weights[4][side] + kv_head * D)  # fmt: skip
    return advance_block(
        s, new[side][LAST] + sequence * new[5 + side][LAST] + kv_head * D, new[2 + side][LAST] + slot * D,
        started[side] + state * D, started[2 + side] + state * M, own, cos_ptr, sin_ptr, block_cos_ptr, block_sin_ptr,
        position, HALF, BLOCK_HALF, L, STRIDE, H_KV, D, BLOCK_D, M, BLOCK_M, COMPRESSION, NUMBERS)  # fmt: skip


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
    q_stride, slots, old_parts, J, scale_log2,
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
    num_parts = old_parts + 1 if APPENDS else old_parts
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
        side, s = (role - old_parts) // SPAN, (role - old_parts) % SPAN
        if (role >= old_parts) & (side == 0):
            column = tl.arange(0, BLOCK_QK)
            q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
            k = _advance_side(0, s, new, started, weights, own_cos_ptr, own_sin_ptr, block_cos_ptr, block_sin_ptr,
                              position, sequence, kv_head, LAST, HALF if ROTATE[LAST] else 0, BLOCK_HALF, COMPRESS_SIZE,
                              STRIDE, H_KV, D_QK, BLOCK_QK, M[0], BLOCK_M[0], COMPRESSION, NUMBERS)  # fmt: skip
            if s == SPAN - 1:
                tl.store(k_ptr + target * D_QK + column, k, mask=ended & (column < D_QK))
                score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale_log2
                stats = stats_ptr + newest * 2 * GROUP + head
                tl.store(stats, tl.where(ended, score, LOWEST), mask=head < GROUP)
                tl.store(stats + GROUP, tl.where(ended & (head >= 0), 1.0, 0.0), mask=head < GROUP)
        if side == 1:
            column = tl.arange(0, BLOCK_V)
            v = _advance_side(1, s, new, started, weights, own_cos_ptr, own_sin_ptr, None, None, position, sequence,
                              kv_head, LAST, 0, 0, COMPRESS_SIZE, STRIDE, H_KV, D_V, BLOCK_V, M[1], BLOCK_M[1],
                              COMPRESSION, NUMBERS)  # fmt: skip
            if s == SPAN - 1:
                tl.store(v_ptr + target * D_V + column, v, mask=ended & (column < D_V))
                o = tl.where(ended & (head >= 0)[:, None], v.to(tl.float32)[None, :], 0.0)
                store_rows(o_ptr, newest * GROUP + head, head < GROUP, o, D_V, BLOCK_V)
        for i in tl.static_range(len(ROTATE) - 1):
            if role == old_parts + 2 * SPAN + i:
                append_head(new[0][i], new[1][i], new[2][i], new[3][i], new[4][i], new[5][i], new[6][i],
                            own_cos_ptr, own_sin_ptr, position, sequence, kv_head, ROTATE[i], H_KV, HALF, D_QK, D_V,
                            BLOCK_QK, BLOCK_V)  # fmt: skip


@triton.jit
def _choose(
    planes_ptr, stats_ptr, bits_ptr, blocks_ptr, indices_ptr, row, segment, num_segments, position, J, num_parts,
    GROUP: tl.constexpr, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PLANES: tl.constexpr,
    BLOCK_PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, PROBES: tl.constexpr,
    APPENDS: tl.constexpr,
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
                                 COMPRESS_SIZE // STRIDE, PLANES, BLOCK_PLANES, PARTS, BLOCKS, HEADS,
                                 APPENDS)  # fmt: skip
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
def _choose_kernel(
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the compressed branch
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    compressed_o_ptr,  # float32 [B, H, D_V]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, segments * SLOTS], where there is more than one segment
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    J, num_parts, num_segments,
    COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_V: tl.constexpr, COLUMNS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK_PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr,
    PROBES: tl.constexpr, APPENDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs choose blocks, or merge columns of the parts."""
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    await_launch_before(EARLY)
    let_next_begin(EARLY)  # which attends the window at once
    if role < num_segments:
        _choose(planes_ptr + row * (PLANES * GROUP) * J, stats_ptr + row * num_parts * (2 * GROUP), bits_ptr,
                blocks_ptr, indices_ptr, row, role, num_segments, position, J, num_parts, GROUP, COMPRESS_SIZE, STRIDE,
                BLOCK_SIZE, SLOTS, BLOCK_SLOTS, INIT, LOCAL, PLANES, BLOCK_PLANES, PARTS, BLOCKS, HEADS, PROBES,
                APPENDS)  # fmt: skip
    else:
        AT_ONCE: tl.constexpr = 16 if PARTS > 32 else 8  # so many parts are there only if rows are few
        merge_columns(o_ptr, stats_ptr, compressed_o_ptr, row, num_parts, (role - num_segments) * COLUMNS,
                      GROUP, ROWS, D_V, COLUMNS, AT_ONCE)  # fmt: skip


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
def _tokens_kernel(
    q_ptr,  # [B, H, D_QK], sequences being `q_stride` apart
    cos_ptr, sin_ptr,  # [B, HALF]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    window_k_ptr, window_v_ptr,  # [B, window_slots, H_KV, D]
    positions_ptr,  # [B]
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], those of the window first
    q_stride, slots, window_slots, window_parts, scale_log2, HALF: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to its share of the window, or of their chosen blocks."""
    let_next_begin(EARLY)
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    q = load_queries(q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, HALF)
    STEPS: tl.constexpr = BLOCK_SIZE // KEYS  # for each block
    of_window = role < window_parts
    first, end = visible_run(position, 1, 1, WINDOW)
    if of_window:
        part, parts, steps = role, window_parts, tl.cdiv(end - first, KEYS)
        k_ptr, v_ptr = window_k_ptr, window_v_ptr
    else:
        part, parts = role - window_parts, tl.num_programs(0) - window_parts
        steps = tl.minimum(position // BLOCK_SIZE + 1, SLOTS) * STEPS
        await_launch_before(EARLY)
    slots, share = tl.where(of_window, window_slots, slots), tl.cdiv(steps, parts)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in tl.range(part * share, tl.minimum(part * share + share, steps)):
        block = tl.load(indices_ptr + row * SLOTS + step // STEPS, mask=role >= window_parts, other=0)
        start = tl.where(of_window, first + step * KEYS, block * BLOCK_SIZE + step % STEPS * KEYS)
        token = start + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token <= position)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    store_part(o_ptr, stats_ptr, row * tl.num_programs(0) + role, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _gate(pointers, LOGITS: tl.constexpr):
    """Gates of one branch, float32, of their logits if they are LOGITS."""
    gates = tl.load(pointers).to(tl.float32)
    return tl.sigmoid(gates) if LOGITS else gates


@triton.jit
def _gated_sum_kernel(
    gates_ptr,  # [B, H, 3], sequences being `gates_stride` apart
    compressed_o_ptr,  # float32 [B, H, D_V]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], those of the window first
    out_ptr,  # [B, H, D_V]
    gates_stride, window_parts, num_parts, H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D_V: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, LOGITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program merges some columns of the parts of one KV head and sums the branches by their gates."""
    kv_head, sequence = tl.program_id(1), wide(tl.program_id(2))
    first, row = tl.program_id(0) * COLUMNS, sequence * H_KV + kv_head
    head, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    own = tl.minimum(head, GROUP - 1)
    gates, heads = gates_ptr + sequence * gates_stride + 3 * (kv_head * GROUP + own), row * GROUP + own
    compressed, selected, sliding = _gate(gates, LOGITS), _gate(gates + 1, LOGITS), _gate(gates + 2, LOGITS)
    await_launch_before(EARLY)
    at, mask = heads[:, None] * D_V + column[None, :], (head < GROUP)[:, None] & (column < D_V)[None, :]
    out = tl.load(compressed_o_ptr + at, mask=mask, other=0.0) * compressed[:, None]
    out += sliding[:, None] * merge_parts(
        o_ptr, stats_ptr, row * num_parts, window_parts, GROUP, ROWS, D_V, first, COLUMNS, AT_ONCE)  # fmt: skip
    out += selected[:, None] * merge_parts(
        o_ptr, stats_ptr, row * num_parts + window_parts, num_parts - window_parts, GROUP, ROWS, D_V, first, COLUMNS,
        AT_ONCE)  # fmt: skip
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


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
    k, v, sliding_k, sliding_v, *summaries = cache
    sizes, precision, scale_log2 = sizes_of(q, k, v), dot_precision(q.dtype), scale * LOG2_E.value
    q, gates, (early, overlap) = whole_rows(q), whole_rows(gates), early_start(q.device)
    B, H_KV, GROUP, _, D_V, keys = sizes
    size, n = config.select_block_size, config.num_selected_blocks
    J = k.shape[1] // size
    blocks = min(_SEGMENT, padded(J))
    segments = triton.cdiv(J, blocks)
    reading = _READING_WIDE if (sizes.D_QK + D_V) * q.element_size() > _NARROW_BYTES else _READING
    window_parts = min(sizes.num_parts(config.window_size, reading, q.device), _WINDOW_PARTS)
    tokens_parts = window_parts + sizes.num_parts(n * size, _TOKENS, q.device)

    planes = 1 + triton.cdiv(config.compress_block_size // config.compress_stride - 1, size // config.compress_stride)
    row = segments * blocks  # of a plane
    plane_logs = q.new_empty(B, H_KV, planes, GROUP, row, dtype=torch.float32)
    queries, o, stats = _attend_summaries(
        q, summaries, positions, config, sizes, plane_logs, reading, J, scale_log2, precision, new
    )  # fmt: skip

    indices = positions.new_empty(B, H_KV, n, dtype=torch.int32)
    bits, candidates = (indices.new_empty(B, H_KV, segments * n if segments > 1 else 0) for _ in range(2))
    compressed_o = q.new_empty(B, H_KV * GROUP, D_V, dtype=torch.float32)
    parts, rows, planes_at_once = o.shape[2], triton.next_power_of_2(GROUP), triton.next_power_of_2(planes)
    warps = max(1, min(_MOST_WARPS, planes_at_once * rows * blocks // _NUMBERS_A_WARP))
    heads = min(rows, max(1, _NUMBERS_A_WARP * warps // (planes_at_once * blocks)))
    _choose_kernel[(segments + padded(D_V) // _COLUMNS, H_KV, B)](
        positions, o, stats, plane_logs, compressed_o, bits, candidates, indices, row, parts, segments,
        config.compress_block_size, config.compress_stride, size, n, padded(n),
        config.num_init_blocks, config.num_local_blocks, H_KV, GROUP, rows, D_V, _COLUMNS, planes, planes_at_once,
        padded(parts), blocks, heads, _PROBES, new is not None, early, num_warps=warps, **overlap,
    )  # fmt: skip
    if segments > 1:
        _merge_segments_kernel[(H_KV, B)](
            positions, bits, candidates, indices, segments * n, H_KV, n, size, padded(segments * n), _PROBES, early,
            **overlap,
        )  # fmt: skip

    tokens_o, tokens_stats = sizes.parts(tokens_parts, q)
    _tokens_kernel[(tokens_parts, H_KV, B)](
        *queries, k, v, sliding_k, sliding_v, positions, indices, tokens_o, tokens_stats,
        q.stride(0), k.shape[1], sliding_k.shape[1], window_parts, scale_log2, _half(queries), n, size,
        config.window_size, *sizes.heads, min(keys, size), precision, early, **_TOKENS.options, **overlap,
    )  # fmt: skip
    out = q.new_empty(B, H_KV * GROUP, D_V)
    at_once = min(triton.next_power_of_2(tokens_parts - window_parts), max(1, _MERGED_ROWS // rows))
    _gated_sum_kernel[(padded(D_V) // _COLUMNS, H_KV, B)](
        gates, compressed_o, tokens_o, tokens_stats, out, gates.stride(0), window_parts, tokens_parts,
        H_KV, GROUP, rows, D_V, _COLUMNS, at_once, gate_logits, early, **overlap,
    )  # fmt: skip
    return NSAOutput(out, indices)


_Queries = tuple[Tensor, Tensor | None, Tensor | None]
"""Queries, and the cosines and sines that they are still to be rotated by."""


def _half(queries: _Queries) -> int:
    """Pairs of dimensions that are still to be rotated."""
    return 0 if queries[1] is None else queries[1].shape[1]


def _attend_summaries(
    q: Tensor, summaries: Sequence[Tensor], positions: Tensor, config: NSAConfig, sizes: Sizes, plane_logs: Tensor,
    reading: Launch, J: int, scale_log2: float, precision: str, new: Any,
) -> tuple[_Queries, Tensor, Tensor]:  # fmt: skip
    """Launch 1: the queries, and the compressed branch in parts, the last of them what a new token completes."""
    (summary_k, summary_v), (early, overlap) = summaries, early_start(q.device)
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size  # noqa: E741
    R, SPAN, planes, row = size // d, l // d, *plane_logs.shape[2::2]
    old_parts = sizes.num_parts(J * R, reading, q.device)
    queries: _Queries = q, None, None
    parts, programs, started, block_rotary = old_parts, old_parts, (), (None, None)
    (*tokens, rotates), (weights, *learned) = pair_arguments(()), weight_arguments(None)
    if new is not None:
        queries = q, *(x.contiguous() for x in new.rotary)
        (*tokens, rotates), (weights, *learned) = (
            pair_arguments([*new.branches, new.compressed]), weight_arguments(new.weights),
        )  # fmt: skip
        parts, programs, started = old_parts + 1, old_parts + 2 * SPAN + len(new.branches), tuple(new.started)
        block_rotary = block_rotary if new.block_rotary is None else tuple(x.contiguous() for x in new.block_rotary)
    o, stats = sizes.parts(parts, q)
    _summaries_kernel[(programs, sizes.H_KV, sizes.B)](
        *queries, *block_rotary, summary_k, summary_v, positions, o, stats, plane_logs, tuple(tokens), started, weights,
        q.stride(0), summary_k.shape[1], old_parts, row, scale_log2,
        rotates, _half(queries), 0 if block_rotary[0] is None else block_rotary[0].shape[1], *learned, TILE_NUMBERS,
        l, d, *sizes.heads, max(sizes.keys, R), R, SPAN, planes, precision, early, **reading.options, **overlap,
    )  # fmt: skip
    return queries, o, stats


_READING, _NARROW_BYTES, _READING_WIDE = Launch(num_stages=2), 256, Launch(num_stages=2, programs=3)
"""Summaries of more bytes, key and value together, are read by as many programs as a multiprocessor has room for."""
_TOKENS = Launch(num_stages=2)
"""Of the kernel that reads the window and the chosen blocks."""
_MOST_WARPS, _NUMBERS_A_WARP = 8, 2048
"""Of a program that ranks blocks, and numbers of the planes that each warp holds at a time."""
_PROBES = 4
"""Bounds that are tried at a time."""
_COLUMNS, _MERGED_ROWS = 16, 256
"""Columns that a program merges, and most rows of parts that it loads at a time."""
_WINDOW_PARTS = 8
"""Most parts of the window."""
_SEGMENT = 1024
"""Blocks that a program ranks."""
