"""Attention of one new token of each sequence to its cache: three launches, whatever the lengths.

    1. attend the summaries and the window, divided over programs; keep what the importance of each block needs, and
       choose the blocks
    2. attend the chosen blocks, divided over programs; meanwhile merge the other branches and sum them by their gates
    3. merge the chosen blocks and add them

Of the programs that attend the summaries of a sequence and KV head the last to come chooses: they count themselves in a
ticket. One row's choice so runs beside what other rows attend, without a launch between.

A tile is the G query heads of one KV head: every key is read once for all of them. What a program computes depends on
the positions, which it reads itself; the grids depend on the cache's size alone, so a CUDA graph can replay them.

The importance of a block is a sum of exp(score - lse) over the heads of a group, and lse is known at the end only. The
programs therefore write, a tile of keys at a time, the logarithms of the planes of `block_selection.py`, each where the
block stands that it counts for: the choice subtracts lse and sums the powers.

From Hopper on the programs of launches 2 and 3 start early, read queries and gates, and wait. Launch 1 starts late:
only then has everything before this call been read.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.block_selection import FORCED, best_of_groups
from nsa_kernels.decode_parts import (
    Launch,
    attend_share,
    load_keys,
    load_queries,
    merge_parts,
    processors,
    sizes_of,
    store_part,
    visible_run,
)
from nsa_kernels.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.elementwise_triton import whole_rows
from nsa_kernels.geometry import NSAConfig, NSAOutput
from nsa_kernels.primitives import HIDDEN, LOG2_E, LOWEST, dot_precision, padded, softmax_step, wide

# B sequences, S, W or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, n slots of
# chosen blocks, J selection blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile of
# attention, HEADS >= G of a merge.


@triton.jit
def _last_to_come(ticket_ptr, num_programs):
    """Whether all others of the programs that share a ticket have written what they write; it is 0 again then.

    The first barrier orders the writes of all threads before the one atomic, whose release makes them visible to the
    whole chip; its acquire and the second barrier order the reads of all threads behind it. Reads go past the L1 cache.
    """
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == num_programs - 1
    if last:
        tl.store(ticket_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def _importance(planes_ptr, stats_ptr, j, visible, J, num_parts, GROUP: tl.constexpr, R: tl.constexpr,
                PLANES: tl.constexpr, PARTS: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Σ over the planes and heads of exp(log plane - lse), of blocks j; HEADS at a time.

    Planes are loaded after the statistics: Triton gives later loads their way, and a thread sums all heads of a block.
    """
    importance, part = tl.zeros([BLOCKS], tl.float32), tl.arange(0, PARTS)
    for first in tl.range(0, GROUP, HEADS):
        head = first + tl.arange(0, HEADS)
        exists, head = head < GROUP, tl.minimum(head, GROUP - 1)
        stats, known = stats_ptr + part[None, :] * 2 * GROUP + head[:, None], (part < num_parts)[None, :]
        part_max = tl.load(stats, mask=known, other=LOWEST, cache_modifier=".cg")
        part_sum = tl.load(stats + GROUP, mask=known, other=0.0, cache_modifier=".cg")
        row_max = tl.max(part_max, 1)
        lse = row_max + tl.log2(tl.sum(part_sum * tl.exp2(part_max - row_max[:, None]), 1))
        for plane in tl.static_range(PLANES):
            source = j - plane
            written = exists[:, None] & ((source >= 0) & (source * R < visible))[None, :]
            rows = (plane * GROUP + head).to(tl.int64)[:, None] * J
            log = tl.load(planes_ptr + rows + j[None, :], cache_modifier=".cg")  # whole rows, also what is not written
            importance += tl.sum(tl.exp2(tl.where(written, log - lse[:, None], LOWEST)), 0)
    return importance


@triton.jit
def _choose_of_segments(bits_ptr, blocks_ptr, indices_ptr, num, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr,
                        CANDIDATES: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    """Choose among the best blocks of all segments."""
    i = tl.arange(0, CANDIDATES)
    bits = tl.load(bits_ptr + i, mask=i < num, other=-1)
    candidate, _, chosen, place = best_of_groups(bits, SLOTS, BLOCK_SLOTS, GROUPS)
    tl.store(indices_ptr + place, tl.load(blocks_ptr + candidate, mask=chosen, other=0), mask=chosen)


@triton.jit
def _choose(
    planes_ptr, stats_ptr, bits_ptr, blocks_ptr, indices_ptr, position, J, num_parts,
    GROUP: tl.constexpr, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr, CANDIDATES: tl.constexpr, GROUPS: tl.constexpr,
    FINAL_GROUPS: tl.constexpr,
):  # fmt: skip
    """Choose the blocks of one sequence and KV head: the best of each segment of BLOCKS, and of those the best."""
    own, slot = position // BLOCK_SIZE, tl.arange(0, BLOCK_SLOTS)
    if own < SLOTS:
        tl.store(indices_ptr + slot, tl.where(slot <= own, slot, -1), mask=slot < SLOTS)
    else:
        _, visible = visible_run(position, COMPRESS_SIZE, STRIDE, 0)
        num_segments = own // BLOCKS + 1
        for segment in range(num_segments):
            j = segment * BLOCKS + tl.arange(0, BLOCKS)
            importance = _importance(planes_ptr, stats_ptr, j, visible, J, num_parts, GROUP, BLOCK_SIZE // STRIDE,
                                     PLANES, PARTS, BLOCKS, TOGETHER)  # fmt: skip
            forced = (j < INIT) | (j > own - LOCAL)
            bits = tl.minimum(tl.maximum(importance.to(tl.int32, bitcast=True), 0), FORCED - 1)
            bits = tl.where(j <= own, tl.where(forced, FORCED, bits), -1)
            candidate, best, chosen, place = best_of_groups(bits, SLOTS, BLOCK_SLOTS, GROUPS)
            block = segment * BLOCKS + candidate
            if num_segments == 1:
                tl.store(indices_ptr + place, block, mask=chosen)
            else:
                none = (slot >= tl.sum(chosen.to(tl.int32), 0)) & (slot < SLOTS)
                tl.store(bits_ptr + segment * SLOTS + slot, tl.full([BLOCK_SLOTS], -1, tl.int32), mask=none)
                tl.store(bits_ptr + segment * SLOTS + place, best, mask=chosen)
                tl.store(blocks_ptr + segment * SLOTS + place, block, mask=chosen)
        if num_segments > 1:
            tl.debug_barrier()
            _choose_of_segments(bits_ptr, blocks_ptr, indices_ptr, num_segments * SLOTS, SLOTS, BLOCK_SLOTS, CANDIDATES,
                                FINAL_GROUPS)  # fmt: skip


@triton.jit
def _choose_kernel(
    q_ptr,  # [B, H, D_QK]
    summary_k_ptr, summary_v_ptr,  # [B, num_summaries, H_KV, D]
    sliding_k_ptr, sliding_v_ptr,  # [B, slots, H_KV, D]
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the compressed branch
    window_o_ptr, window_stats_ptr,  # the same of P_window parts
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    bits_ptr, blocks_ptr,  # int32 [B, H_KV, CANDIDATES], where there may be more than one segment
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    tickets_ptr,  # int32 [B, H_KV], zeros
    num_summaries, slots, J, num_parts, scale_log2,
    COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, PLANES: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, TOGETHER: tl.constexpr, CANDIDATES: tl.constexpr, GROUPS: tl.constexpr,
    FINAL_GROUPS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends one KV head to a share of the summaries or of the window; one of the former also chooses.

    The programs of the window come last: they fill the chip while blocks are chosen.
    """
    await_launch_before(EARLY)
    let_next_begin(EARLY)  # which reads queries and gates at once
    kv_head, sequence, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, row = tl.load(positions_ptr + sequence), wide(sequence) * H_KV + kv_head
    R: tl.constexpr = BLOCK_SIZE // STRIDE
    if part < num_parts:
        first, end = visible_run(position, COMPRESS_SIZE, STRIDE, 0)
        attend_share(q_ptr, summary_k_ptr, summary_v_ptr, o_ptr, stats_ptr, planes_ptr, sequence, kv_head, first, end,
                     part, num_parts, num_summaries, J, scale_log2, H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V,
                     KEYS if KEYS > R else R, R, SPAN, PLANES, PRECISION)  # fmt: skip
        if _last_to_come(tickets_ptr + row, num_parts):
            _choose(planes_ptr + row * (PLANES * GROUP) * J, stats_ptr + row * num_parts * (2 * GROUP),
                    bits_ptr + row * CANDIDATES, blocks_ptr + row * CANDIDATES, indices_ptr + row * SLOTS, position, J,
                    num_parts, GROUP, COMPRESS_SIZE, STRIDE, BLOCK_SIZE, SLOTS, BLOCK_SLOTS, INIT, LOCAL, PLANES, PARTS,
                    BLOCKS, TOGETHER, CANDIDATES, GROUPS, FINAL_GROUPS)  # fmt: skip
    else:
        first, end = visible_run(position, 1, 1, WINDOW)
        attend_share(q_ptr, sliding_k_ptr, sliding_v_ptr, window_o_ptr, window_stats_ptr, None, sequence, kv_head,
                     first, end, part - num_parts, tl.num_programs(2) - num_parts, slots, J, scale_log2, H_KV, GROUP,
                     ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, 1, 1, 0, PRECISION)  # fmt: skip


@triton.jit
def _attend_chosen(
    q_ptr, k_ptr, v_ptr, indices_ptr, o_ptr, stats_ptr, sequence, kv_head, position, part, num_parts, slots, scale_log2,
    SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attend the queries of one KV head to a share of their chosen blocks, and write the part."""
    row = wide(sequence) * H_KV + kv_head
    q, _ = load_queries(q_ptr, sequence, kv_head, H_KV, GROUP, ROWS, D_QK, BLOCK_QK)
    STEPS: tl.constexpr = BLOCK_SIZE // KEYS  # for each block
    steps = tl.minimum(position // BLOCK_SIZE + 1, SLOTS) * STEPS
    share = tl.cdiv(steps, num_parts)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    await_launch_before(EARLY)
    for step in tl.range(part * share, tl.minimum(part * share + share, steps)):
        start = tl.load(indices_ptr + row * SLOTS + step // STEPS) * BLOCK_SIZE
        token = start + step % STEPS * KEYS + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token <= position)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    store_part(o_ptr, stats_ptr, row * num_parts + part, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _load_gates(gates_ptr, branch: tl.constexpr, sequence, kv_head, stride, GROUP: tl.constexpr, HEADS: tl.constexpr,
                LOGITS: tl.constexpr):  # fmt: skip
    """The gates of one branch, a column [HEADS, 1] of the heads of one KV head; of their logits if they are LOGITS."""
    head = kv_head * GROUP + tl.minimum(tl.arange(0, HEADS), GROUP - 1)
    gates = tl.load(gates_ptr + wide(sequence) * stride + 3 * head + branch).to(tl.float32)[:, None]
    return tl.sigmoid(gates) if LOGITS else gates


@triton.jit
def _selected_kernel(
    q_ptr,  # [B, H, D_QK]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    gates_ptr,  # [B, H, 3]
    positions_ptr,  # [B]
    indices_ptr,  # int32 [B, H_KV, SLOTS]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the selected branch
    compressed_o_ptr, compressed_stats_ptr, window_o_ptr, window_stats_ptr,  # the same of as many parts as they have
    others_ptr,  # float32 [B, H, D_V], the gated sum of those
    slots, gates_stride, num_parts, compressed_parts, window_parts, scale_log2,
    SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    AT_ONCE: tl.constexpr, LOGITS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends one KV head to a share of its chosen blocks, or sums columns of the other branches.

    The programs of the sum come last: they are short and fill the chip as the others end.
    """
    let_next_begin(EARLY)
    kv_head, sequence, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if part < num_parts:
        _attend_chosen(q_ptr, k_ptr, v_ptr, indices_ptr, o_ptr, stats_ptr, sequence, kv_head,
                       tl.load(positions_ptr + sequence), part, num_parts, slots, scale_log2, SLOTS, BLOCK_SIZE, H_KV,
                       GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, PRECISION, EARLY)  # fmt: skip
    else:
        row, head = wide(sequence) * H_KV + kv_head, tl.arange(0, HEADS)
        column = (part - num_parts) * COLUMNS + tl.arange(0, COLUMNS)
        compressed = _load_gates(gates_ptr, 0, sequence, kv_head, gates_stride, GROUP, HEADS, LOGITS)
        sliding = _load_gates(gates_ptr, 2, sequence, kv_head, gates_stride, GROUP, HEADS, LOGITS)
        await_launch_before(EARLY)
        others = compressed * merge_parts(compressed_o_ptr, compressed_stats_ptr, row * compressed_parts,
                                          compressed_parts, column, GROUP, HEADS, D_V, AT_ONCE)  # fmt: skip
        others += sliding * merge_parts(window_o_ptr, window_stats_ptr, row * window_parts,
                                        window_parts, column, GROUP, HEADS, D_V, AT_ONCE)  # fmt: skip
        at = (row * GROUP + head)[:, None] * D_V + column[None, :]
        tl.store(others_ptr + at, others, mask=(head < GROUP)[:, None] & (column < D_V)[None, :])


@triton.jit
def _gated_sum_kernel(
    gates_ptr,  # [B, H, 3]
    others_ptr,  # float32 [B, H, D_V], the gated sum of the other branches
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP], of the selected branch
    out_ptr,  # [B, H, D_V]
    gates_stride, num_parts, H_KV: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, D_V: tl.constexpr,
    COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr, LOGITS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program merges some columns of the chosen blocks of one KV head and adds them to the other branches."""
    kv_head, sequence = tl.program_id(1), tl.program_id(2)
    row, head = wide(sequence) * H_KV + kv_head, tl.arange(0, HEADS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    selected = _load_gates(gates_ptr, 1, sequence, kv_head, gates_stride, GROUP, HEADS, LOGITS)
    at = (row * GROUP + head)[:, None] * D_V + column[None, :]
    mask = (head < GROUP)[:, None] & (column < D_V)[None, :]
    await_launch_before(EARLY)
    out = tl.load(others_ptr + at, mask=mask, other=0.0)
    out += selected * merge_parts(o_ptr, stats_ptr, row * num_parts, num_parts, column, GROUP, HEADS, D_V, AT_ONCE)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def sparse_attention(
    q: Tensor,
    gates: Tensor,
    gate_logits: bool,
    cache: Sequence[Tensor],
    positions: Tensor,
    tickets: Tensor,
    config: NSAConfig,
    scale: float,
) -> NSAOutput:
    """`decode.decode_attention` of contiguous tensors, `gates` aside; `cache` as a LayerCache."""
    k, v, sliding_k, sliding_v, summary_k, summary_v = cache
    sizes, precision, scale_log2 = sizes_of(q, k, v), dot_precision(q.dtype), scale * LOG2_E.value
    gates, (early, overlap) = whole_rows(gates), early_start(q.device)
    B, H_KV, GROUP, _, D_V, keys = sizes
    l, d, size, n = (  # noqa: E741
        config.compress_block_size, config.compress_stride, config.select_block_size, config.num_selected_blocks,
    )  # fmt: skip
    R, SPAN = size // d, l // d
    J = k.shape[1] // size
    planes, blocks = 1 + triton.cdiv(SPAN - 1, R), min(_SEGMENT, padded(J))
    segments = triton.cdiv(J, blocks)
    many = B * H_KV * triton.cdiv(J * R, keys) >= _MANY_STEPS * processors(q.device)
    reading = _READING_MANY if many else _READING
    parts = sizes.num_parts(J * R, reading, q.device)
    window_parts = min(sizes.num_parts(config.window_size, reading, q.device), _WINDOW_PARTS)
    selected_parts = sizes.num_parts(n * size, _SELECTED, q.device)

    row = segments * blocks  # of a plane
    plane_logs = q.new_empty(B, H_KV, planes, GROUP, row, dtype=torch.float32)
    compressed, window = sizes.parts(parts, q), sizes.parts(window_parts, q)
    indices = positions.new_empty(B, H_KV, n, dtype=torch.int32)
    candidates = padded(segments * n)
    bits, candidate_blocks = (indices.new_empty(B, H_KV, candidates if segments > 1 else 0) for _ in range(2))
    together = min(triton.next_power_of_2(GROUP), max(1, _PLANE_NUMBERS // blocks))
    _choose_kernel[(H_KV, B, parts + window_parts)](
        q, summary_k, summary_v, sliding_k, sliding_v, positions, *compressed, *window, plane_logs,
        bits, candidate_blocks, indices, tickets, summary_k.shape[1], sliding_k.shape[1], row, parts, scale_log2,
        l, d, size, config.window_size, n, padded(n), config.num_init_blocks, config.num_local_blocks,
        *sizes.heads, keys, SPAN, planes, padded(parts), blocks, together, candidates,
        _groups(n, blocks), _groups(n, candidates), precision, early,
        maxnreg=reading.registers, **reading.options, **overlap,
    )  # fmt: skip

    heads, stride = triton.next_power_of_2(GROUP), gates.stride(0)
    columns = min(padded(D_V), max(_COLUMNS, _PART_NUMBERS // heads))
    selected, others = sizes.parts(selected_parts, q), q.new_empty(B, H_KV * GROUP, D_V, dtype=torch.float32)
    _selected_kernel[(H_KV, B, selected_parts + triton.cdiv(D_V, columns))](
        q, k, v, gates, positions, indices, *selected, *compressed, *window, others, k.shape[1], stride,
        selected_parts, parts, window_parts, scale_log2, n, size, *sizes.heads, min(keys, size), heads, columns,
        _at_once(max(parts, window_parts), heads * columns), gate_logits, precision, early,
        **_SELECTED.options, **overlap,
    )  # fmt: skip
    out = q.new_empty(B, H_KV * GROUP, D_V)
    _gated_sum_kernel[(triton.cdiv(D_V, _COLUMNS), H_KV, B)](
        gates, others, *selected, out, stride, selected_parts, H_KV, GROUP, heads, D_V, _COLUMNS,
        _at_once(selected_parts, heads * _COLUMNS), gate_logits, early, **overlap,
    )  # fmt: skip
    return NSAOutput(out, indices)


def _groups(n: int, candidates: int) -> int:
    """In how many groups `best_of_groups` compares fewest pairs; every candidate is one where they are few."""
    slots, groups = padded(n), candidates
    while candidates > _FEW and groups > slots and groups**2 > (slots * candidates // groups) ** 2:
        groups //= 2
    return groups


def _at_once(num_parts: int, numbers: int) -> int:
    """How many parts, of so many numbers each, a merge loads at a time."""
    return min(triton.next_power_of_2(num_parts), max(1, _MERGED_NUMBERS // numbers))


_READING = Launch(num_warps=4, num_stages=2, programs=3)
"""Of the kernel that reads summaries."""
_MANY_STEPS, _READING_MANY = 8, Launch(num_warps=8, num_stages=3, programs=2)
"""The same where each multiprocessor reads at least so many tiles of summaries."""
_SELECTED = Launch()
"""Of the kernel that reads the chosen blocks."""
_FEW = 128
"""Candidates of which every pair is compared at once."""
_PLANE_NUMBERS = 2**13
"""Numbers of a plane that the choice holds at a time: as many programs as read are to fit the registers."""
_COLUMNS = 16
"""Columns that a program merges at least."""
_PART_NUMBERS = 2**8
"""Numbers of a part that a program beside the chosen blocks merges, if those columns of all heads have fewer."""
_MERGED_NUMBERS = 2**12
"""Numbers of all parts that a merge loads at a time."""
_WINDOW_PARTS = 4
"""Most parts of the window."""
_SEGMENT = 2048
"""Blocks that are ranked at a time."""
