"""Softmax attention of one new token of each sequence, its keys divided over programs: few queries fill a chip so.

    o = Σ_parts exp(max_part - max) · o_part / Σ_parts exp(max_part - max) · sum_part

A tile is the G query heads of one KV head: every key is read once for all of them. Full attention of a cache is this
alone; NSA attends its summaries and its window so (`step.py`).
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.arguments import Heads, heads_of
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


class Queries(NamedTuple):
    """Queries, and the cosines and sines that they are still to be rotated by, or None."""

    q: Any  # [B, H, D_QK]
    stride: Any  # from one sequence to the next
    cos: Any  # [B, HALF]
    sin: Any


class Cached(NamedTuple):
    """Keys and values of a cache, [B, slots, H_KV, D]."""

    k: Any
    v: Any
    slots: Any


class Parts(NamedTuple):
    """Softmaxes whose keys are divided, unfinished: float32."""

    o: Any  # [parts, GROUP, D_V]
    stats: Any  # [parts, 2, GROUP], maximum and sum


class Softmax(NamedTuple):
    """An unfinished softmax of the queries of one KV head."""

    row_max: Any  # [ROWS]
    row_sum: Any  # [ROWS]
    acc: Any  # [ROWS, BLOCK_V]


class Planes(NamedTuple):
    """Where the planes of one sequence and KV head go."""

    log: Any  # float32 [B, H_KV, PLANES, GROUP, J]
    row: Any
    J: Any


@triton.jit
def load_queries(
    queries, sequence, kv_head, HEADS: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """The queries of one KV head, rotated if HALF is not 0; rows past the group repeat its last."""
    GROUP: tl.constexpr = HEADS.GROUP
    D: tl.constexpr = HEADS.D_QK
    head, column = kv_head * GROUP + tl.minimum(tl.arange(0, ROWS), GROUP - 1), tl.arange(0, HEADS.BLOCK_QK)[None, :]
    rows, mask = queries.q + wide(sequence) * queries.stride + head[:, None] * D, column < D
    q = tl.load(rows + column, mask=mask, other=0.0)
    if HALF > 0:
        other = tl.where(column < HALF, column + HALF, column - HALF)
        partner = tl.load(rows + other, mask=mask & (column < 2 * HALF), other=0.0).to(tl.float32)
        angles = wide(sequence) * HALF
        q = turn(q.to(tl.float32), partner, column, queries.cos + angles, queries.sin + angles, HALF).to(q.dtype)
    return q


@triton.jit
def load_keys(cached, sequence, token, kv_head, HEADS: tl.constexpr):
    """Keys and values of tokens of a sequence from a cache, token t in slot t % slots."""
    rows = (wide(sequence) * cached.slots + token % cached.slots) * HEADS.H_KV + kv_head
    return load_rows(cached.k, rows, HEADS.D_QK, HEADS.BLOCK_QK), load_rows(cached.v, rows, HEADS.D_V, HEADS.BLOCK_V)


@triton.jit
def store_part(parts, part, softmax, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Write an unfinished softmax as one of the parts."""
    GROUP: tl.constexpr = HEADS.GROUP
    head = tl.arange(0, ROWS)
    store_rows(parts.o, part * GROUP + head, head < GROUP, softmax.acc, HEADS.D_V, HEADS.BLOCK_V)
    tl.store(parts.stats + part * 2 * GROUP + head, softmax.row_max, mask=head < GROUP)
    tl.store(parts.stats + (part * 2 + 1) * GROUP + head, softmax.row_sum, mask=head < GROUP)


@triton.jit
def merge_parts(
    parts, first_part, num_parts, first_column,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of o, [ROWS, COLUMNS], of a softmax whose keys were divided; 0 where there were none."""
    GROUP: tl.constexpr = HEADS.GROUP
    D: tl.constexpr = HEADS.D_V
    head, column = tl.minimum(tl.arange(0, ROWS), GROUP - 1), first_column + tl.arange(0, COLUMNS)
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, num_parts, AT_ONCE):  # loads of several parts at a time: none waits for another
        i = start + tl.arange(0, AT_ONCE)
        exists, part = i < num_parts, first_part + tl.minimum(i, num_parts - 1)
        stats = parts.stats + part[:, None] * 2 * GROUP + head[None, :]
        part_max = tl.where(exists[:, None], tl.load(stats), LOWEST)  # [AT_ONCE, ROWS]
        part_sum = tl.load(stats + GROUP)
        rows = part[:, None] * GROUP + head[None, :]
        mask = exists[:, None, None] & (column < D)[None, None, :]
        o = tl.load(parts.o + rows[:, :, None] * D + column[None, None, :], mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        old, new = tl.exp2(row_max - new_max), tl.exp2(part_max - new_max[None, :])
        new = tl.where(exists[:, None], new, 0.0)
        row_sum = row_sum * old + tl.sum(part_sum * new, 0)
        acc = acc * old[:, None] + tl.sum(o * new[:, :, None], 0)
        row_max = new_max
    return acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]


@triton.jit
def merge_columns(
    parts, out_ptr, row, num_parts, first_column,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one sequence and KV head and write COLUMNS columns of [B * H, D_V]."""
    o = merge_parts(parts, row * num_parts, num_parts, first_column, HEADS, ROWS, COLUMNS, AT_ONCE)
    head, column = tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    out = out_ptr + (row * HEADS.GROUP + head)[:, None] * HEADS.D_V + column[None, :]
    mask = (head < HEADS.GROUP)[:, None] & (column < HEADS.D_V)[None, :]
    tl.store(out, o.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_planes(products, row_max, scale_log2, start, planes, GROUP: tl.constexpr, GEOMETRY: tl.constexpr):
    """Write what a tile of summaries gives to each plane, from key `start` on."""
    ROWS: tl.constexpr = products.shape[0]
    R: tl.constexpr = GEOMETRY.R
    PLANES: tl.constexpr = GEOMETRY.PLANES
    BLOCKS: tl.constexpr = products.shape[1] // R
    new_max = tl.maximum(row_max, tl.max(products, 1) * scale_log2)
    p = tl.reshape(tl.exp2(products * scale_log2 - new_max[:, None]), [ROWS, BLOCKS, R])
    head, r, j = tl.arange(0, ROWS), tl.arange(0, R), start // R + tl.arange(0, BLOCKS)
    for plane in tl.static_range(PLANES):
        part = tl.sum(p * plane_weight(r, plane, R, GEOMETRY.SPAN)[None, None, :], 2)
        out = ((planes.row * PLANES + plane) * GROUP + head)[:, None] * planes.J + plane + j[None, :]
        mask = (head < GROUP)[:, None] & (plane + j < planes.J)[None, :]
        log = tl.log2(tl.maximum(part, SMALLEST)) + new_max[:, None]
        tl.store(planes.log + out, log, mask=mask)


@triton.jit
def attend_part(
    q, cached, sequence, kv_head, lo, hi, scale_log2, planes,
    HEADS: tl.constexpr, KEYS: tl.constexpr, GEOMETRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running softmax of queries over the keys [lo, hi), with GEOMETRY also the planes of each tile of keys."""
    ROWS: tl.constexpr = q.shape[0]
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    row_max, row_sum = tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for start in tl.range(lo, hi, KEYS):
        token = start + tl.arange(0, KEYS)
        k, v = load_keys(cached, sequence, token, kv_head, HEADS)
        products = tl.where((token < hi)[None, :], tl.dot(q, k.T, input_precision=PRECISION), HIDDEN)
        if GEOMETRY is not None:
            _store_planes(products, row_max, scale_log2, start, planes, HEADS.GROUP, GEOMETRY)
        row_max, row_sum, acc = softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION)
    return Softmax(row_max, row_sum, acc)


@triton.jit
def _parts_kernel(
    q_ptr,  # [B, H, D_QK]
    k_ptr, v_ptr,  # [B, slots, H_KV, D]
    positions_ptr,  # [B]
    o_ptr,  # float32 [B, H_KV, P, GROUP, D_V]
    stats_ptr,  # float32 [B, H_KV, P, 2, GROUP]
    slots, scale_log2, WINDOW: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one KV head to its share of the keys that they see."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    part, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, end = visible_run(tl.load(positions_ptr + sequence), 1, 1, WINDOW)
    share = tl.cdiv(tl.cdiv(end - first, KEYS), tl.num_programs(0)) * KEYS
    lo = first + part * share
    queries, cached = Queries(q_ptr, HEADS.H * HEADS.D_QK, None, None), Cached(k_ptr, v_ptr, slots)
    q = load_queries(queries, sequence, kv_head, HEADS, ROWS, 0)
    row = wide(sequence) * HEADS.H_KV + kv_head
    softmax = attend_part(q, cached, sequence, kv_head, lo, tl.minimum(lo + share, end), scale_log2, None,
                          HEADS, KEYS, None, PRECISION)  # fmt: skip
    store_part(Parts(o_ptr, stats_ptr), row * tl.num_programs(0) + part, softmax, HEADS, ROWS)


@triton.jit
def _merge_kernel(
    o_ptr,  # float32 [B, H_KV, P, GROUP, D_V]
    stats_ptr,  # float32 [B, H_KV, P, 2, GROUP]
    out_ptr,  # [B, H, D_V]
    num_parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program merges the parts of some columns of one KV head of one sequence."""
    await_launch_before(EARLY)
    row, first_column = wide(tl.program_id(2)) * HEADS.H_KV + tl.program_id(1), tl.program_id(0) * COLUMNS
    merge_columns(Parts(o_ptr, stats_ptr), out_ptr, row, num_parts, first_column, HEADS, ROWS, COLUMNS, 8)


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
    heads: Heads
    rows: int  # of a tile
    keys: int  # of a tile

    def num_parts(self, most_keys: int, launch: Launch, device: torch.device) -> int:
        """Programs that share the keys of one KV head: enough of them keep the chip busy."""
        wanted = launch.programs * _processors(device) // (self.B * self.heads.H_KV)
        return max(1, min(wanted, ceil_div(most_keys, self.keys), _MAX_PARTS))

    def parts(self, num_parts: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where unfinished softmaxes go: sums, and their maximum and sum of weights."""
        shape = (self.B, self.heads.H_KV, num_parts)
        o = like.new_empty(*shape, self.heads.GROUP, self.heads.D_V, dtype=torch.float32)
        return o, like.new_empty(*shape, 2, self.heads.GROUP, dtype=torch.float32)


def sizes_of(q: Tensor, v: Tensor) -> Sizes:
    """The sizes of queries [B, H, D_qk] and a cache of values [B, S, H_kv, D_v]."""
    heads = heads_of(q, v)
    row_bytes = padded(heads.BLOCK_QK + heads.BLOCK_V) * q.element_size()  # a power of two, as keys must be
    keys = max(16, min(64, _STAGE_BYTES // row_bytes))
    return Sizes(len(q), heads, padded(heads.GROUP), 4 if interpreted() else keys)


@functools.cache
def _processors(device: torch.device) -> int:
    return 1 if interpreted() else torch.cuda.get_device_properties(device).multi_processor_count


def launch_dense_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window_size: int | None, scale: float
) -> Tensor:
    """`decode.decode_dense_attention` of contiguous tensors."""
    sizes, slots = sizes_of(q, v), k.shape[1]
    window_size = min(window_size or 0, LONGEST_WINDOW)
    parts, (early, overlap) = sizes.num_parts(window_size or slots, _READING, q.device), early_start(q.device)
    o, stats = sizes.parts(parts, q)
    _parts_kernel[(parts, sizes.heads.H_KV, sizes.B)](
        q, k, v, positions, o, stats, slots, scale * LOG2_E.value, window_size,
        sizes.heads, sizes.rows, sizes.keys, dot_precision(q.dtype), early, **_READING.options, **overlap,
    )  # fmt: skip
    out = q.new_empty(*q.shape[:2], sizes.heads.D_V)
    columns = sizes.heads.BLOCK_V // _MERGERS
    _merge_kernel[(_MERGERS, sizes.heads.H_KV, sizes.B)](
        o, stats, out, parts, sizes.heads, sizes.rows, columns, early, **overlap
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
