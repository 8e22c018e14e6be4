"""The first launch of a step of decoding: what a new token is appended to, and its attention to the summaries.

For one sequence and KV head some programs attend the summaries that are older than the token, a share each, and keep
what the importance of each block needs (`step.py` says how). The others append the token, carry the summaries
on (`triton/summarise.py`), and attend the one that it completes: a part of its own.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.decode.append import append_head, new_pairs
from nsa_kernels.decode.parts import (
    Cached,
    Launch,
    Parts,
    Planes,
    Queries,
    Sizes,
    attend_part,
    load_queries,
    store_part,
    visible_run,
)
from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.triton.arguments import Heads
from nsa_kernels.triton.block_selection import Geometry
from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.primitives import LOWEST, store_rows, wide
from nsa_kernels.triton.summarise import (
    TILE_NUMBERS,
    Angles,
    Sides,
    Token,
    advance_block,
    summary_sizes,
    weights_for_kernel,
)

# B sequences, S or C slots of a cache, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, J selection
# blocks, P parts that a run of keys is divided in, R = l' / d, ROWS >= G rows of a tile.


@triton.jit
def _completes_block(position, GEOMETRY: tl.constexpr):
    """Whether the token is the last of a compression block."""
    L: tl.constexpr = GEOMETRY.COMPRESS_SIZE
    return (position + 1 >= L) & ((position + 1 - L) % GEOMETRY.STRIDE == 0)


@triton.jit
def older_summaries(position, GEOMETRY: tl.constexpr, APPENDS: tl.constexpr):
    """Summaries that a token sees; with APPENDS without the one that it completes."""
    _, visible = visible_run(position, GEOMETRY.COMPRESS_SIZE, GEOMETRY.STRIDE, 0)
    return visible - _completes_block(position, GEOMETRY).to(tl.int32) if APPENDS else visible


@triton.jit
def _own_token(token, slots, stride, position, sequence, kv_head, SIZES: tl.constexpr):
    """The new key or value of one KV head of a sequence, tokens being `stride` apart from one sequence to the next."""
    D: tl.constexpr = SIZES.D
    slot = (sequence * slots + position % slots) * SIZES.H_KV + kv_head
    state = sequence * (SIZES.L // SIZES.STRIDE * SIZES.H_KV) + kv_head
    return Token(token.x + sequence * stride + kv_head * D, token.slot + slot * D,
                 token.sum + state * D, token.mapped + state * SIZES.M)  # fmt: skip


@triton.jit
def _store_score(parts, part, exists, head, score, GROUP: tl.constexpr):
    """Maximum and sum of a part that is one key, if it exists."""
    stats = parts.stats + part * 2 * GROUP + head
    tl.store(stats, tl.where(exists, score, LOWEST), mask=head < GROUP)
    tl.store(stats + GROUP, tl.where(exists & (head >= 0), 1.0, 0.0), mask=head < GROUP)


@triton.jit
def _summaries_kernel(
    q_ptr,  # [B, H, D_QK], sequences being `q_stride` apart
    cos_ptr, sin_ptr,  # [B, HALF]
    block_cos_ptr, block_sin_ptr,  # [B, BLOCK_HALF]
    k_ptr, v_ptr,  # [B, slots, H_KV, D], summaries
    positions_ptr,  # [B]
    o_ptr, stats_ptr,  # float32 [B, H_KV, P, GROUP, D_V] and [B, H_KV, P, 2, GROUP]
    planes_ptr,  # float32 [B, H_KV, PLANES, GROUP, J]
    new,  # a NewPair of each branch, the compressed one last
    started,  # StartedBlocks, float32 [B, S, H_KV, D or M]
    weights,  # Sides of CompressionWeights
    q_stride, slots, old_parts, J, scale_log2,
    ROTATE: tl.constexpr, HALF: tl.constexpr, SUMMARIES: tl.constexpr, GEOMETRY: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For one sequence and KV head programs attend their share of the summaries, or append a branch's new token."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)  # which reads queries and gates at once
    H_KV: tl.constexpr = HEADS.H_KV
    SPAN: tl.constexpr = GEOMETRY.SPAN
    APPENDS: tl.constexpr = len(ROTATE) > 0
    role, kv_head, sequence = tl.program_id(0), tl.program_id(1), wide(tl.program_id(2))
    position, row = tl.load(positions_ptr + sequence), sequence * H_KV + kv_head
    queries, cached = Queries(q_ptr, q_stride, cos_ptr, sin_ptr), Cached(k_ptr, v_ptr, slots)
    parts, planes = Parts(o_ptr, stats_ptr), Planes(planes_ptr, row, J)
    num_parts = old_parts + 1 if APPENDS else old_parts
    if role < old_parts:
        end = older_summaries(position, GEOMETRY, APPENDS)
        share = tl.cdiv(tl.cdiv(end, KEYS), old_parts) * KEYS
        q = load_queries(queries, sequence, kv_head, HEADS, ROWS, HALF)
        softmax = attend_part(q, cached, sequence, kv_head, role * share, tl.minimum(role * share + share, end),
                              scale_log2, planes, HEADS, KEYS, GEOMETRY, PRECISION)  # fmt: skip
        store_part(parts, row * num_parts + role, softmax, HEADS, ROWS)
    if APPENDS:
        LAST: tl.constexpr = len(ROTATE) - 1
        ended, head = _completes_block(position, GEOMETRY), tl.arange(0, ROWS)
        newest = row * num_parts + old_parts
        block = tl.maximum(position + 1 - GEOMETRY.COMPRESS_SIZE, 0) // GEOMETRY.STRIDE
        target = (sequence * slots + block) * H_KV + kv_head
        angles, pair = Angles(cos_ptr + sequence * HALF, sin_ptr + sequence * HALF), new[LAST]
        side, s = (role - old_parts) // SPAN, (role - old_parts) % SPAN
        K_SIZES: tl.constexpr = SUMMARIES.k
        if K_SIZES.BLOCK_HALF > 0:
            block_cos_ptr += sequence * K_SIZES.BLOCK_HALF
            block_sin_ptr += sequence * K_SIZES.BLOCK_HALF
        if (role >= old_parts) & (side == 0):
            column = tl.arange(0, K_SIZES.BLOCK_D)
            q = load_queries(queries, sequence, kv_head, HEADS, ROWS, HALF)
            token = _own_token(Token(pair.k, pair.k_slots, started.k_sum, started.k_mapped), pair.slots, pair.k_stride,
                               position, sequence, kv_head, K_SIZES)  # fmt: skip
            k = advance_block(s, token, weights.k, angles, Angles(block_cos_ptr, block_sin_ptr), position, kv_head,
                              K_SIZES)  # fmt: skip
            if s == SPAN - 1:
                tl.store(k_ptr + target * K_SIZES.D + column, k, mask=ended & (column < K_SIZES.D))
                score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale_log2
                _store_score(parts, newest, ended, head, score, HEADS.GROUP)
        if side == 1:
            V_SIZES: tl.constexpr = SUMMARIES.v
            column = tl.arange(0, V_SIZES.BLOCK_D)
            token = _own_token(Token(pair.v, pair.v_slots, started.v_sum, started.v_mapped), pair.slots, pair.v_stride,
                               position, sequence, kv_head, V_SIZES)  # fmt: skip
            v = advance_block(s, token, weights.v, None, None, position, kv_head, V_SIZES)
            if s == SPAN - 1:
                tl.store(v_ptr + target * V_SIZES.D + column, v, mask=ended & (column < V_SIZES.D))
                o = tl.where(ended & (head >= 0)[:, None], v.to(tl.float32)[None, :], 0.0)
                store_rows(o_ptr, newest * HEADS.GROUP + head, head < HEADS.GROUP, o, V_SIZES.D, V_SIZES.BLOCK_D)
        for i in tl.static_range(len(ROTATE) - 1):
            if role == old_parts + 2 * SPAN + i:
                append_head(new[i], angles, position, sequence, kv_head, ROTATE[i], HEADS, HALF)


class Rotated(NamedTuple):
    """Queries, and the cosines and sines that they are still to be rotated by."""

    q: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None

    @property
    def half(self) -> int:
        """Pairs of dimensions that are still to be rotated."""
        return 0 if self.cos is None else self.cos.shape[1]


def reading_launch(q: Tensor, heads: Heads) -> Launch:
    """How summaries are read for queries q."""
    return _READING_WIDE if (heads.D_QK + heads.D_V) * q.element_size() > _NARROW_BYTES else _READING


def attend_summaries(
    q: Tensor, summaries: Sequence[Tensor], positions: Tensor, config: NSAConfig, sizes: Sizes, plane_logs: Tensor,
    reading: Launch, J: int, scale_log2: float, precision: str, new: Any,
) -> tuple[Rotated, Tensor, Tensor]:  # fmt: skip
    """Launch 1: the queries, and the compressed branch in parts, the last of them what a new token completes."""
    (summary_k, summary_v), heads, (early, overlap) = summaries, sizes.heads, early_start(q.device)
    planes, row = plane_logs.shape[2::2]
    geometry = Geometry(config.compress_block_size, config.compress_stride, config.select_block_size, planes)
    old_parts = sizes.num_parts(J * geometry.R, reading, q.device)
    queries, started, weights, summary_constants = Rotated(q), None, Sides(None, None), None
    block_rotary: tuple[Tensor | None, Tensor | None] = (None, None)
    parts, programs, (tokens, rotates) = old_parts, old_parts, new_pairs(())
    if new is not None:
        queries, started = Rotated(q, *(x.contiguous() for x in new.rotary)), new.started
        (tokens, rotates), weights = new_pairs([*new.branches, new.compressed]), weights_for_kernel(new.weights)
        if new.block_rotary is not None:
            block_rotary = new.block_rotary[0].contiguous(), new.block_rotary[1].contiguous()
        half = queries.half if rotates[-1] else 0
        summary_constants = _summary_constants(new.weights, config, heads, half, block_rotary)
        parts, programs = old_parts + 1, old_parts + 2 * geometry.SPAN + len(new.branches)
    o, stats = sizes.parts(parts, q)
    _summaries_kernel[(programs, heads.H_KV, sizes.B)](
        *queries, *block_rotary, summary_k, summary_v, positions, o, stats, plane_logs, tokens, started, weights,
        q.stride(0), summary_k.shape[1], old_parts, row, scale_log2,
        rotates, queries.half, summary_constants, geometry, heads, sizes.rows, max(sizes.keys, geometry.R), precision,
        early, **reading.options, **overlap,
    )  # fmt: skip
    return queries, o, stats


def _summary_constants(
    weights: tuple[CompressionWeights, CompressionWeights] | None, config: NSAConfig, heads: Heads, half: int,
    block_rotary: tuple[Tensor | None, ...],
) -> Sides:  # fmt: skip
    """The sizes of keys and of values, of which only keys are rotated: in `half` pairs of dimensions each token."""
    of_keys, of_values = (None, None) if weights is None else weights
    block_half = 0 if block_rotary[0] is None else block_rotary[0].shape[1]
    return Sides(
        summary_sizes(of_keys, config, heads.H_KV, heads.D_QK, half, block_half, TILE_NUMBERS),
        summary_sizes(of_values, config, heads.H_KV, heads.D_V, 0, 0, TILE_NUMBERS),
    )


_READING, _NARROW_BYTES, _READING_WIDE = Launch(num_stages=2), 256, Launch(num_stages=2, programs=3)
"""Summaries of more bytes, key and value together, are read by as many programs as a multiprocessor has room for."""
