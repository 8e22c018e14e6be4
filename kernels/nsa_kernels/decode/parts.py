"""Softmax attention of one new token of each sequence, its keys divided over programs: few queries fill a chip so.

    o = Σ_parts exp(max_part - max) · o_part / Σ_parts exp(max_part - max) · sum_part

A tile is the G query heads of one KV head: every key is read once for all of them. Full attention of a cache is this
alone; NSA attends its summaries and its window so (`step.py`).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.block_selection import plane_weight
from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.elementwise import turn
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    ceil_div,
    dot_precision,
    interpreted,
    load_rows,
    padded,
    softmax_step,
    store_rows,
    wide,
)

# B sequences, S slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, J selection blocks,
# P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.

SMALLEST = tl.constexpr(2.0**-126)
"""What stands for 0 where a logarithm is taken: the smallest normal float32."""


@triton.jit
def visible_run(position, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr):
    """First and end of the summaries (blocks of 1 are tokens) that a token sees; of the last WINDOW if it is not 0."""
    length = position + 1
    end = tl.where(length >= BLOCK_SIZE, (length - BLOCK_SIZE) // STRIDE + 1, 0)
    return tl.maximum(end - WINDOW, 0) if WINDOW > 0 else 0, end


@triton.jit
def load_queries(
    q_ptr, q_stride, cos_ptr, sin_ptr, sequence, kv_head,
    GROUP: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The queries of one KV head, rotated if HALF is not 0; rows past the group repeat its last."""
    head, column = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1), tl.arange(0, BLOCK_D)[None, :]
    rows, mask = q_ptr + wide(sequence) * q_stride + head[:, None] * D, column < D
    q = tl.load(rows + column, mask=mask, other=0.0)
    if HALF > 0:
        other = tl.where(column < HALF, column + HALF, column - HALF)
        partner = tl.load(rows + other, mask=mask & (column < 2 * HALF), other=0.0).to(tl.float32)
        angles = wide(sequence) * HALF
        q = turn(q.to(tl.float32), partner, column, cos_ptr + angles, sin_ptr + angles, HALF).to(q.dtype)
    return q


@triton.jit
def load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV: tl.constexpr, D_QK: tl.constexpr,
               D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr):  # fmt: skip
    """Keys and values of tokens of a sequence from a cache [B, slots, H_KV, D], token t in slot t % slots."""
    rows = (wide(sequence) * slots + token % slots) * H_KV + kv_head
    return load_rows(k_ptr, rows, D_QK, BLOCK_QK), load_rows(v_ptr, rows, D_V, BLOCK_V)


@triton.jit
def store_part(o_ptr, stats_ptr, part, row_max, row_sum, acc, GROUP: tl.constexpr, ROWS: tl.constexpr,
                D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Write an unfinished softmax: acc to [parts, GROUP, D], maximum and sum to [parts, 2, GROUP]."""
    head = tl.arange(0, ROWS)
    store_rows(o_ptr, part * GROUP + head, head < GROUP, acc, D, BLOCK_D)
    tl.store(stats_ptr + part * 2 * GROUP + head, row_max, mask=head < GROUP)
    tl.store(stats_ptr + (part * 2 + 1) * GROUP + head, row_sum, mask=head < GROUP)


@triton.jit
def merge_parts(o_ptr, stats_ptr, first_part, num_parts, GROUP: tl.constexpr, ROWS: tl.constexpr,
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
def merge_columns(o_ptr, stats_ptr, out_ptr, row, num_parts, first_column, GROUP: tl.constexpr, ROWS: tl.constexpr,
                   D: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr):  # fmt: skip
    """Merge the parts of one sequence and KV head and write COLUMNS columns of [B * H, D]."""
    o = merge_parts(o_ptr, stats_ptr, row * num_parts, num_parts, GROUP, ROWS, D, first_column, COLUMNS, AT_ONCE)
    head, column = tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    out = out_ptr + (row * GROUP + head)[:, None] * D + column[None, :]
    tl.store(out, o.to(out_ptr.dtype.element_ty), mask=(head < GROUP)[:, None] & (column < D)[None, :])


@triton.jit
def attend_part(
    q, k_ptr, v_ptr, sequence, lo, hi, slots, kv_head, scale_log2, planes_ptr, row, J,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, R: tl.constexpr, SPAN: tl.constexpr,
    PLANES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running softmax of queries over the keys [lo, hi), with PLANES also the planes of each tile of keys."""
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for start in tl.range(lo, hi, KEYS):
        token = start + tl.arange(0, KEYS)
        k, v = load_keys(k_ptr, v_ptr, sequence, token, slots, kv_head, H_KV, D_QK, D_V, BLOCK_QK, BLOCK_V)
        products = tl.where((token < hi)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        if PLANES > 0:
            new_max = tl.maximum(row_max, tl.max(products, 1) * scale_log2)
            p = tl.reshape(tl.exp2(products * scale_log2 - new_max[:, None]), [ROWS, KEYS // R, R])
            head, r, j = tl.arange(0, ROWS), tl.arange(0, R), start // R + tl.arange(0, KEYS // R)
            for plane in tl.static_range(PLANES):
                part = tl.sum(p * plane_weight(r, plane, R, SPAN)[None, None, :], 2)
                out = ((row * PLANES + plane) * GROUP + head)[:, None] * J + plane + j[None, :]
                mask = (head < GROUP)[:, None] & (plane + j < J)[None, :]
                log = tl.log2(tl.maximum(part, SMALLEST)) + new_max[:, None]
                tl.store(planes_ptr + out, log, mask=mask)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    return row_max, row_sum, acc


@triton.jit
def _parts_kernel(
    q_ptr,  # [B, H, D_QK]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    positions_ptr,  # [B]
    o_ptr,  # float32 [B, H_KV, P, GROUP, D_V]
    stats_ptr,  # float32 [B, H_KV, P, 2, GROUP]
    slots, scale_log2, WINDOW: tl.constexpr,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_QK: tl.constexpr, D_V: tl.constexpr,
    BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to its share of the keys that they see."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    part, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = visible_run(tl.load(positions_ptr + sequence), 1, 1, WINDOW)
    share = tl.cdiv(tl.cdiv(end - first, KEYS), tl.num_programs(0)) * KEYS
    lo = first + part * share
    q = load_queries(q_ptr, H_KV * GROUP * D_QK, None, None, sequence, kv_head, GROUP, ROWS, D_QK, BLOCK_QK, 0)
    row = wide(sequence) * H_KV + kv_head
    row_max, row_sum, acc = attend_part(
        q, k_ptr, v_ptr, sequence, lo, tl.minimum(lo + share, end), slots, kv_head, scale_log2, None, row, 0,
        H_KV, GROUP, ROWS, D_QK, D_V, BLOCK_QK, BLOCK_V, KEYS, 1, 1, 0, PRECISION)  # fmt: skip
    out = row * tl.num_programs(0) + part
    store_part(o_ptr, stats_ptr, out, row_max, row_sum, acc, GROUP, ROWS, D_V, BLOCK_V)


@triton.jit
def _merge_kernel(
    o_ptr,  # float32 [B, H_KV, P, GROUP, D_V]
    stats_ptr,  # float32 [B, H_KV, P, 2, GROUP]
    out_ptr,  # [B, H, D_V]
    num_parts,
    H_KV: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, D_V: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program merges the parts of some columns of one KV head of one sequence."""
    await_launch_before(EARLY)
    row = wide(tl.program_id(2)) * H_KV + tl.program_id(1)
    merge_columns(o_ptr, stats_ptr, out_ptr, row, num_parts, tl.program_id(0) * COLUMNS,
                  GROUP, ROWS, D_V, COLUMNS, 8)  # fmt: skip


class Launch(NamedTuple):
    """How a kernel is spread over the chip."""

    num_warps: int = 4
    num_stages: int = 3
    """Steps of a loop that are under way at a time."""
    programs: int = 4
    """Programs for each multiprocessor, if there are keys enough to divide."""

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes by name."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class Sizes(NamedTuple):
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

    def num_parts(self, most_keys: int, launch: Launch, device: torch.device) -> int:
        """Programs that share the keys of one KV head: enough of them keep the chip busy."""
        wanted = launch.programs * _processors(device) // (self.B * self.H_KV)
        return max(1, min(wanted, ceil_div(most_keys, self.keys), _MAX_PARTS))

    def parts(self, num_parts: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where unfinished softmaxes go: sums, and their maximum and sum of weights."""
        shape = (self.B, self.H_KV, num_parts)
        o = like.new_empty(*shape, self.GROUP, self.D_V, dtype=torch.float32)
        return o, like.new_empty(*shape, 2, self.GROUP, dtype=torch.float32)


def sizes_of(q: Tensor, k: Tensor, v: Tensor) -> Sizes:
    """The sizes of queries [B, H, D_qk] and a cache of keys and values [B, S, H_kv, D]."""
    (B, H, D_QK), H_KV, D_V = q.shape, k.shape[2], v.shape[3]
    row_bytes = padded(padded(D_QK) + padded(D_V)) * q.element_size()  # a power of two, as keys must be
    keys = max(16, min(64, _STAGE_BYTES // row_bytes))
    return Sizes(B, H_KV, H // H_KV, D_QK, D_V, 4 if interpreted() else keys)


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def launch_dense_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window_size: int | None, scale: float
) -> Tensor:
    """`decode.decode_dense_attention` of contiguous tensors."""
    sizes, slots = sizes_of(q, k, v), k.shape[1]
    window_size = min(window_size or 0, LONGEST_WINDOW)
    parts, (early, overlap) = sizes.num_parts(window_size or slots, _READING, q.device), early_start(q.device)
    o, stats = sizes.parts(parts, q)
    _parts_kernel[(parts, sizes.H_KV, sizes.B)](
        q, k, v, positions, o, stats, slots, scale * LOG2_E.value, window_size, *sizes.heads,
        sizes.keys, dot_precision(q.dtype), early, **_READING.options, **overlap,
    )  # fmt: skip
    out = q.new_empty(*q.shape[:2], sizes.D_V)
    columns = padded(sizes.D_V) // _MERGERS
    _merge_kernel[(_MERGERS, sizes.H_KV, sizes.B)](
        o, stats, out, parts, sizes.H_KV, sizes.GROUP, padded(sizes.GROUP), sizes.D_V, columns, early, **overlap
    )
    return out


LONGEST_WINDOW = 2**30
"""Beyond it a window holds all tokens, and positions less a window stay int32."""
_STAGE_BYTES = 2**15
"""Keys and values that a step of a loop loads, three steps ahead: what fits the shared memory of every chip."""
_READING = Launch()
"""Of the kernel that reads a run of keys."""
_MAX_PARTS = 64
"""Most parts of a run of keys."""
_MERGERS = 4
"""Programs that share the columns of a merge."""
