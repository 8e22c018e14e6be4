"""Attention of one new token of each sequence to its cache: four launches, whatever the lengths.

    1. attend the summaries, divided over programs; keep what the importance of each block needs. Other programs append
       the new token, where that is still to be done (`summaries.py`)
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
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.decode.parts import (
    LONGEST_WINDOW,
    Cached,
    Launch,
    Parts,
    Queries,
    Softmax,
    load_keys,
    load_queries,
    merge_columns,
    merge_parts,
    sizes_of,
    store_part,
    visible_run,
)
from nsa_kernels.decode.summaries import attend_summaries, older_summaries, reading_launch
from nsa_kernels.geometry import NSAConfig, NSAOutput, filled_slots
from nsa_kernels.triton.block_selection import FORCED, Choice, Geometry, best_soon, plane_weight, reach_of
from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.elementwise import whole_rows
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    ceil_div,
    dot_precision,
    padded,
    power_of_two,
    softmax_step,
    wide,
)

# B sequences, S, W or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, n slots of
# chosen blocks, J selection blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.


class Ranking(NamedTuple):
    """What a program that ranks blocks holds at a time, constants of a kernel."""

    BLOCK_PLANES: int
    PARTS: int
    BLOCKS: int
    HEADS: int
    PROBES: int


class Candidates(NamedTuple):
    """The best blocks of each segment, where there is more than one: int32 [B, H_KV, segments * SLOTS]."""

    bits: Any
    blocks: Any


class Scores(NamedTuple):
    """What the importance of blocks of one sequence and KV head is computed from."""

    planes: Any  # float32 [PLANES, GROUP, J]
    stats: Any  # float32 [parts, 2, GROUP]
    J: Any
    num_parts: Any


@triton.jit
def _importance(scores, j, visible, GROUP: tl.constexpr, GEOMETRY: tl.constexpr, RANKING: tl.constexpr,
                APPENDS: tl.constexpr):  # fmt: skip
    """Σ over the planes and heads of exp(log plane - lse), of blocks j; some heads at a time.

    With APPENDS the last part is summary `visible` alone, or nothing, and in no plane. All loads come first: none waits
    for what is computed of another.
    """
    R: tl.constexpr = GEOMETRY.R
    PLANES: tl.constexpr = GEOMETRY.PLANES
    BLOCKS: tl.constexpr = RANKING.BLOCKS
    AT_ONCE: tl.constexpr = RANKING.HEADS
    importance, part = tl.zeros([BLOCKS], tl.float32), tl.arange(0, RANKING.PARTS)
    plane = tl.arange(0, RANKING.BLOCK_PLANES)
    source = j[None, :] - plane[:, None]
    written = (plane < PLANES)[:, None] & (source >= 0) & (source * R < visible)
    for first in tl.static_range(0, GROUP, AT_ONCE):
        head = first + tl.arange(0, AT_ONCE)
        exists, head = head < GROUP, tl.minimum(head, GROUP - 1)
        rows = (tl.minimum(plane, PLANES - 1)[:, None] * GROUP + head[None, :]).to(tl.int64) * scores.J
        log = tl.load(scores.planes + rows[:, :, None] + j[None, None, :])  # whole rows, also what is not written
        latest = tl.load(scores.stats + (scores.num_parts - 1) * (2 * GROUP) + head)
        stats, known = scores.stats + part[None, :] * 2 * GROUP + head[:, None], (part < scores.num_parts)[None, :]
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
                weight = plane_weight(visible % R, m, R, GEOMETRY.SPAN)
                importance += tl.where(j == visible // R + m, weight * p, 0.0)
    return importance


@triton.jit
def _choose(
    scores, candidates, indices_ptr, row, segment, num_segments, position,
    GROUP: tl.constexpr, GEOMETRY: tl.constexpr, CHOICE: tl.constexpr, RANKING: tl.constexpr, APPENDS: tl.constexpr,
):  # fmt: skip
    """Choose among the blocks of a segment of one sequence and KV head; where it is the only one, for good."""
    SLOTS: tl.constexpr = CHOICE.SLOTS
    own, slot = position // GEOMETRY.BLOCK_SIZE, tl.arange(0, CHOICE.BLOCK_SLOTS)
    if own < SLOTS:
        chosen_all = tl.where(slot <= own, slot, -1)
        tl.store(indices_ptr + row * SLOTS + slot, chosen_all, mask=(slot < SLOTS) & (segment == 0))
    else:
        visible = older_summaries(position, GEOMETRY, APPENDS)
        j = segment * RANKING.BLOCKS + tl.arange(0, RANKING.BLOCKS)
        importance = _importance(scores, j, visible, GROUP, GEOMETRY, RANKING, APPENDS)
        forced = (j < CHOICE.INIT) | (j > own - CHOICE.LOCAL)
        bits = tl.minimum(tl.maximum(importance.to(tl.int32, bitcast=True), 0), FORCED - 1)
        bits = tl.where(j <= own, tl.where(forced, FORCED, bits), -1)
        chosen, place = best_soon(bits, SLOTS, RANKING.PROBES)
        if num_segments == 1:
            tl.store(indices_ptr + row * SLOTS + place, j, mask=chosen)
        else:
            out, none = (row * num_segments + segment) * SLOTS, tl.full([CHOICE.BLOCK_SLOTS], -1, tl.int32)
            tl.store(candidates.bits + out + slot, none, mask=slot < SLOTS)
            tl.debug_barrier()
            tl.store(candidates.bits + out + place, bits, mask=chosen)
            tl.store(candidates.blocks + out + place, j, mask=chosen)


@triton.jit
def _choose_kernel(
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the compressed branch
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    compressed_o_ptr,  # float32 [B, H, D_V]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, segments * SLOTS], where there is more than one segment
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    J, num_parts, num_segments,
    GEOMETRY: tl.constexpr, CHOICE: tl.constexpr, RANKING: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, APPENDS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs choose blocks, or merge columns of the parts."""
    GROUP: tl.constexpr = HEADS.GROUP
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * HEADS.H_KV + kv_head
    await_launch_before(EARLY)
    let_next_begin(EARLY)  # which attends the window at once
    if role < num_segments:
        scores = Scores(planes_ptr + row * (GEOMETRY.PLANES * GROUP) * J, stats_ptr + row * num_parts * (2 * GROUP),
                        J, num_parts)  # fmt: skip
        _choose(scores, Candidates(bits_ptr, blocks_ptr), indices_ptr, row, role, num_segments, position,
                GROUP, GEOMETRY, CHOICE, RANKING, APPENDS)  # fmt: skip
    else:
        AT_ONCE: tl.constexpr = 16 if RANKING.PARTS > 32 else 8  # so many parts are there only if rows are few
        merge_columns(Parts(o_ptr, stats_ptr), compressed_o_ptr, row, num_parts, (role - num_segments) * COLUMNS,
                      HEADS, ROWS, COLUMNS, AT_ONCE)  # fmt: skip


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
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to its share of the window, or of their chosen blocks."""
    let_next_begin(EARLY)
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * HEADS.H_KV + kv_head
    q = load_queries(Queries(q_ptr, q_stride, cos_ptr, sin_ptr), sequence, kv_head, HEADS, ROWS, HALF)
    STEPS: tl.constexpr = BLOCK_SIZE // KEYS  # for each block
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
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
    cached = Cached(k_ptr, v_ptr, slots)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in tl.range(part * share, tl.minimum(part * share + share, steps)):
        block = tl.load(indices_ptr + row * SLOTS + step // STEPS, mask=~of_window, other=0)
        start = tl.where(of_window, first + step * KEYS, block * BLOCK_SIZE + step % STEPS * KEYS)
        token = start + tl.arange(0, KEYS)
        k, v = load_keys(cached, sequence, token, kv_head, HEADS)
        products = tl.where((token <= position)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    softmax = Softmax(row_max, row_sum, acc)
    store_part(Parts(o_ptr, stats_ptr), row * tl.num_programs(0) + role, softmax, HEADS, ROWS)


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
    gates_stride, window_parts, num_parts, HEADS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, LOGITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program merges some columns of the parts of one KV head and sums the branches by their gates."""
    GROUP: tl.constexpr = HEADS.GROUP
    D_V: tl.constexpr = HEADS.D_V
    kv_head, sequence = tl.program_id(1), wide(tl.program_id(2))
    first, row = tl.program_id(0) * COLUMNS, sequence * HEADS.H_KV + kv_head
    head, column = tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    own = tl.minimum(head, GROUP - 1)
    gates, heads = gates_ptr + sequence * gates_stride + 3 * (kv_head * GROUP + own), row * GROUP + own
    compressed, selected, sliding = _gate(gates, LOGITS), _gate(gates + 1, LOGITS), _gate(gates + 2, LOGITS)
    await_launch_before(EARLY)
    at, mask = heads[:, None] * D_V + column[None, :], (head < GROUP)[:, None] & (column < D_V)[None, :]
    out = tl.load(compressed_o_ptr + at, mask=mask, other=0.0) * compressed[:, None]
    parts = Parts(o_ptr, stats_ptr)
    out += sliding[:, None] * merge_parts(
        parts, row * num_parts, window_parts, first, HEADS, ROWS, COLUMNS, AT_ONCE)  # fmt: skip
    out += selected[:, None] * merge_parts(
        parts, row * num_parts + window_parts, num_parts - window_parts, first, HEADS, ROWS, COLUMNS,
        AT_ONCE)  # fmt: skip
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def attend_step(
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
    sizes, precision, scale_log2 = sizes_of(q, v), dot_precision(q.dtype), scale * LOG2_E.value
    q, gates, (early, overlap) = whole_rows(q), whole_rows(gates), early_start(q.device)
    B, heads, _, keys = sizes
    H_KV, GROUP, D_V = heads.H_KV, heads.GROUP, heads.D_V
    size, window = config.select_block_size, min(config.window_size, LONGEST_WINDOW)
    n = filled_slots(config.num_selected_blocks, size, k.shape[1])
    J = k.shape[1] // size
    blocks = min(_SEGMENT, padded(J))
    segments = ceil_div(J, blocks)
    reading = reading_launch(q, heads)
    window_parts = min(sizes.num_parts(window, reading, q.device), _WINDOW_PARTS)
    tokens_parts = window_parts + sizes.num_parts(n * size, _TOKENS, q.device)

    planes = 1 + reach_of(config.compress_block_size, config.compress_stride, size)
    row = segments * blocks  # of a plane
    plane_logs = q.new_empty(B, H_KV, planes, GROUP, row, dtype=torch.float32)
    queries, o, stats = attend_summaries(
        q, summaries, positions, config, sizes, plane_logs, reading, J, scale_log2, precision, new
    )  # fmt: skip

    indices = positions.new_empty(B, H_KV, n, dtype=torch.int32)
    bits, candidates = (indices.new_empty(B, H_KV, segments * n if segments > 1 else 0) for _ in range(2))
    compressed_o = q.new_empty(B, H_KV * GROUP, D_V, dtype=torch.float32)
    parts, rows, planes_at_once = o.shape[2], power_of_two(GROUP), power_of_two(planes)
    warps = max(1, min(_MOST_WARPS, planes_at_once * rows * blocks // _NUMBERS_A_WARP))
    heads_at_once = min(rows, max(1, _NUMBERS_A_WARP * warps // (planes_at_once * blocks)))
    _choose_kernel[(segments + padded(D_V) // _COLUMNS, H_KV, B)](
        positions, o, stats, plane_logs, compressed_o, bits, candidates, indices, row, parts, segments,
        Geometry(config.compress_block_size, config.compress_stride, size, planes),
        Choice(n, padded(n), config.num_init_blocks, config.num_local_blocks),
        Ranking(planes_at_once, padded(parts), blocks, heads_at_once, _PROBES),
        heads, rows, _COLUMNS, new is not None, early, num_warps=warps, **overlap,
    )  # fmt: skip
    if segments > 1:
        _merge_segments_kernel[(H_KV, B)](
            positions, bits, candidates, indices, segments * n, H_KV, n, size, padded(segments * n), _PROBES, early,
            **overlap,
        )  # fmt: skip

    tokens_o, tokens_stats = sizes.parts(tokens_parts, q)
    _tokens_kernel[(tokens_parts, H_KV, B)](
        *queries, k, v, sliding_k, sliding_v, positions, indices, tokens_o, tokens_stats,
        q.stride(0), k.shape[1], sliding_k.shape[1], window_parts, scale_log2, queries.half, n, size,
        window, heads, sizes.rows, min(keys, size), precision, early, **_TOKENS.options, **overlap,
    )  # fmt: skip
    out = q.new_empty(B, H_KV * GROUP, D_V)
    at_once = min(power_of_two(tokens_parts - window_parts), max(1, _MERGED_ROWS // rows))
    _gated_sum_kernel[(padded(D_V) // _COLUMNS, H_KV, B)](
        gates, compressed_o, tokens_o, tokens_stats, out, gates.stride(0), window_parts, tokens_parts,
        heads, rows, _COLUMNS, at_once, gate_logits, early, **overlap,
    )  # fmt: skip
    empty = config.num_selected_blocks - n
    return NSAOutput(out, torch.nn.functional.pad(indices, (0, empty), value=-1) if empty else indices)


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
