"""The first launch of a step of decoding: what a new token is appended to, and its attention to the summaries.

For one sequence and KV head some programs attend the summaries that are older than the token, a share each, and keep
what the importance of each block needs (`step.py` says how). The others append the token, carry the summaries
on (`triton/summarise.py`), and attend the one that it completes: a part of its own.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.decode.append import append_head, pair_arguments
from nsa_kernels.decode.parts import Launch, Sizes, attend_part, load_queries, store_part, visible_run
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.primitives import LOWEST, store_rows, wide
from nsa_kernels.triton.summarise import TILE_NUMBERS, advance_block, weight_arguments

# B sequences, S or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, J selection
# blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.


@triton.jit
def _completes_block(position, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Whether the token is the last of a compression block."""
    return (position + 1 >= COMPRESS_SIZE) & ((position + 1 - COMPRESS_SIZE) % STRIDE == 0)


@triton.jit
def older_summaries(position, COMPRESS_SIZE: tl.constexpr, STRIDE: tl.constexpr, APPENDS: tl.constexpr):
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
        end = older_summaries(position, COMPRESS_SIZE, STRIDE, APPENDS)
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


Queries = tuple[Tensor, Tensor | None, Tensor | None]
"""Queries, and the cosines and sines that they are still to be rotated by."""


def rotated_pairs(queries: Queries) -> int:
    """Pairs of dimensions that are still to be rotated."""
    return 0 if queries[1] is None else queries[1].shape[1]


def reading_launch(q: Tensor, sizes: Sizes) -> Launch:
    """How summaries are read for queries q."""
    return _READING_WIDE if (sizes.D_QK + sizes.D_V) * q.element_size() > _NARROW_BYTES else _READING


def attend_summaries(
    q: Tensor, summaries: Sequence[Tensor], positions: Tensor, config: NSAConfig, sizes: Sizes, plane_logs: Tensor,
    reading: Launch, J: int, scale_log2: float, precision: str, new: Any,
) -> tuple[Queries, Tensor, Tensor]:  # fmt: skip
    """Launch 1: the queries, and the compressed branch in parts, the last of them what a new token completes."""
    (summary_k, summary_v), (early, overlap) = summaries, early_start(q.device)
    l, d, size = config.compress_block_size, config.compress_stride, config.select_block_size  # noqa: E741
    R, SPAN, planes, row = size // d, l // d, *plane_logs.shape[2::2]
    old_parts = sizes.num_parts(J * R, reading, q.device)
    queries: Queries = q, None, None
    parts, programs, started, block_rotary = old_parts, old_parts, (), (None, None)
    pairs, learned_parts = ((), None) if new is None else ([*new.branches, new.compressed], new.weights)
    (*tokens, rotates), (weights, *learned) = pair_arguments(pairs), weight_arguments(learned_parts)
    if new is not None:
        queries = q, *(x.contiguous() for x in new.rotary)
        parts, programs, started = old_parts + 1, old_parts + 2 * SPAN + len(new.branches), tuple(new.started)
        block_rotary = block_rotary if new.block_rotary is None else tuple(x.contiguous() for x in new.block_rotary)
    o, stats = sizes.parts(parts, q)
    _summaries_kernel[(programs, sizes.H_KV, sizes.B)](
        *queries, *block_rotary, summary_k, summary_v, positions, o, stats, plane_logs, tuple(tokens), started, weights,
        q.stride(0), summary_k.shape[1], old_parts, row, scale_log2,
        rotates, rotated_pairs(queries), 0 if block_rotary[0] is None else block_rotary[0].shape[1], *learned,
        TILE_NUMBERS, l, d, *sizes.heads, max(sizes.keys, R), R, SPAN, planes, precision, early,
        **reading.options, **overlap,
    )  # fmt: skip
    return queries, o, stats


_READING, _NARROW_BYTES, _READING_WIDE = Launch(num_stages=2), 256, Launch(num_stages=2, programs=3)
"""Summaries of more bytes, key and value together, are read by as many programs as a multiprocessor has room for."""
