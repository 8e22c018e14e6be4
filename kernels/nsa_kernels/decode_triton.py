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

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.block_selection import FORCED, best
from nsa_kernels.decode_parts import (
    MERGERS,
    attend_part,
    load_keys,
    load_queries,
    merge_columns,
    merge_parts,
    parts_kernel,
    sizes_of,
    store_part,
    visible_run,
)
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
        _, visible = visible_run(position, COMPRESS_SIZE, STRIDE, 0)
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
        merge_columns(o_ptr, stats_ptr, compressed_o_ptr, row, num_parts, first_column,
                       GROUP, ROWS, D_V, BLOCK_V // MERGERS)  # fmt: skip
    else:
        part, window_parts = role - num_segments - MERGERS, tl.num_programs(0) - num_segments - MERGERS
        first, end = visible_run(position, 1, 1, WINDOW)
        share = tl.cdiv(tl.cdiv(end - first, KEYS), window_parts) * KEYS
        lo = first + part * share
        q, _ = load_queries(q_ptr, sequence, kv_head, H_KV, GROUP, ROWS, D_QK, BLOCK_QK)
        row_max, row_sum, acc = attend_part(
            q, k_ptr, v_ptr, sequence, lo, tl.minimum(lo + share, end), slots, kv_head, scale_log2, None, None, row, J,
            tiles, H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, 1, 1, 0, PRECISION)  # fmt: skip
        out = row * window_parts + part
        store_part(window_o_ptr, window_stats_ptr, out, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


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
    q, rows = load_queries(q_ptr, sequence, kv_head, H_KV, GROUP, ROWS, D_QK, BLOCK_QK)
    slot = tl.arange(0, BLOCK_SLOTS)
    block = tl.load(indices_ptr + row * SLOTS + slot, mask=slot < SLOTS, other=-1)
    steps = tl.sum((block >= 0).to(tl.int32), 0) * (BLOCK_SIZE // KEYS)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for step in tl.range(0, steps):
        start = tl.load(indices_ptr + row * SLOTS + step // (BLOCK_SIZE // KEYS)) * BLOCK_SIZE
        token = start + step % (BLOCK_SIZE // KEYS) * KEYS + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token <= position)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    selected = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
    window = merge_parts(window_o_ptr, window_stats_ptr, row * window_parts, window_parts,
                          GROUP, ROWS, D_V, 0, BLOCK_V, 4)  # fmt: skip
    out = selected * tl.load(gates_ptr + 3 * rows + 1).to(tl.float32)[:, None]
    out += load_rows(compressed_o_ptr, rows, D_V, BLOCK_V) * tl.load(gates_ptr + 3 * rows).to(tl.float32)[:, None]
    out += window * tl.load(gates_ptr + 3 * rows + 2).to(tl.float32)[:, None]
    store_rows(out_ptr, rows, tl.arange(0, ROWS) < GROUP, out, D_V, BLOCK_V)


@functools.cache
def _stages_alone(device: torch.device) -> int:
    """Steps that a program loads ahead which has a multiprocessor to itself."""
    return 6 if not interpreted() and torch.cuda.get_device_capability(device)[0] in (9, 10) else 3


def sparse_attention(
    q: Tensor, gates: Tensor, cache: Sequence[Tensor], positions: Tensor, config: NSAConfig, scale: float
) -> NSAOutput:
    """`decode.decode_attention` of contiguous tensors; `cache` as a LayerCache."""
    k, v, sliding_k, sliding_v, summary_k, summary_v = cache
    sizes, precision, scale_log2 = sizes_of(q, k, v), dot_precision(q.dtype), scale * LOG2_E.value
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
    parts_kernel[(parts, H_KV, B)](
        q, summary_k, summary_v, positions, o, stats, plane_sums, maxima, summary_k.shape[1], J, tiles, scale_log2,
        l, d, 0, *sizes.heads, summaries, R, SPAN, planes, precision, num_warps=4, num_stages=3,
    )  # fmt: skip

    indices = positions.new_empty(B, H_KV, n, dtype=torch.int32)
    bits, candidates = (indices.new_empty(B, H_KV, segments * n if segments > 1 else 0) for _ in range(2))
    compressed_o = q.new_empty(B, H_KV * GROUP, D_V, dtype=torch.float32)
    _choose_kernel[(segments + MERGERS + window_parts, H_KV, B)](
        q, sliding_k, sliding_v, positions, o, stats, plane_sums, maxima, compressed_o, window_o, window_stats,
        bits, candidates, indices, sliding_k.shape[1], J, tiles, parts, segments, scale_log2,
        l, d, size, config.window_size, n, padded(n), config.num_init_blocks, config.num_local_blocks,
        *sizes.heads, keys, summaries, planes, padded(parts), blocks, MERGERS, precision, num_warps=4, num_stages=3,
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


_WINDOW_PARTS = 4
"""Most parts of the window, which the last kernel merges on its way."""
_SEGMENT = 1024
"""Blocks that a program ranks."""
