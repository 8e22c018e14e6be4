"""Stage 3: choose for each query and group of heads the blocks it attends to (arXiv:2502.11089, eq. 8-11).

    p[i] = sum over the heads of a group of exp(q · k̃_i · scale - lse)
    importance[j] = Σ_i p[i] · |chunks of block j that compression block i covers|

With R = l'/d chunks a block and S = l/d chunks a compression block, compression block i = j·R + r covers the chunks
r ... r + S - 1 counted from the start of block j: w_0 of them lie in block j, w_1 in block j + 1, and so on. A tile of
scores therefore gives A_m[j] = Σ_r w_m[r] · p[j·R + r], and importance[j] = Σ_m A_m[j - m]. Most of these sums lie in
one tile; what its last blocks give to the next tile's first is kept apart, as spill. Both are kept for a chunk of
queries at a time: their size is bounded, whatever the length.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.geometry import NSAConfig, filled_slots
from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.arguments import heads_of
from nsa_kernels.triton.primitives import (
    LOG2_E,
    block_descriptor,
    ceil_div,
    dot_precision,
    load_block,
    padded,
    power_of_two,
    row_addresses,
    wide,
)
from nsa_kernels.triton.tuning import fitted_tile

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim, C rows of compressed blocks,
# J selection blocks that a query may rank, n slots, R and S as above, Q queries of a chunk, REACH the largest m.

FORCED = tl.constexpr(0x7F800000)
"""Bits of the infinite importance of a forced block."""

_SMALL_SEGMENT, _SEGMENT = 256, 1024
"""Blocks of a query that a program ranks."""

_CHUNK_BYTES = 2**27
"""Size of the importance of a chunk of queries."""


class Geometry(NamedTuple):
    """How summaries and selection blocks lie, constants of a kernel."""

    COMPRESS_SIZE: int
    STRIDE: int
    BLOCK_SIZE: int
    PLANES: int  # selection blocks that a summary counts for at most

    @property
    def R(self) -> int:  # noqa: N802
        """Summaries that begin in a selection block."""
        return self.BLOCK_SIZE // self.STRIDE

    @property
    def SPAN(self) -> int:  # noqa: N802
        """Strides in a compression block."""
        return self.COMPRESS_SIZE // self.STRIDE


class Choice(NamedTuple):
    """Which blocks are chosen, constants of a kernel."""

    SLOTS: int
    BLOCK_SLOTS: int
    INIT: int  # of the first blocks, so many are always chosen
    LOCAL: int  # and of the last


@triton.jit
def plane_weight(r, m, R: tl.constexpr, S: tl.constexpr):
    """w_m[r]: chunks of block j + m that compression block j * R + r covers, float32."""
    return tl.maximum(tl.minimum(r + S, (m + 1) * R) - tl.maximum(r, m * R), 0).to(tl.float32)


@triton.jit
def _importance_kernel(
    q_desc,  # [T, H, D]
    k_desc,  # [C, H_KV, D]
    lse_ptr,  # [T, H]
    document_start_ptr, first_ptr, end_ptr,  # [T]
    importance_ptr,  # float32 [H_KV, Q, J]
    spill_ptr,  # float32 [H_KV, Q, tiles of keys, REACH * (REACH + 1) / 2]
    first_query, end_query, J, scale_log2, unranked,
    HEADS: tl.constexpr, GEOMETRY: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program scores a tile of queries against one block of compressed keys, all heads of a group summed.

    The first `unranked` queries of a document choose every block and are not ranked. A tile is no longer than that, so
    all the queries in it that are ranked belong to the document of its first.
    """
    GROUP: tl.constexpr = HEADS.GROUP
    R: tl.constexpr = GEOMETRY.R
    REACH: tl.constexpr = GEOMETRY.PLANES - 1
    key_block, tile, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_start = first_query + tile * QUERIES
    token = tile_start + tl.arange(0, QUERIES)
    exists = token < end_query
    document_start, first = tl.load(document_start_ptr + tile_start), tl.load(first_ptr + tile_start)
    ranked = exists & (tl.load(document_start_ptr + token, mask=exists, other=-1) == document_start)
    ranked &= token - document_start >= unranked
    visible = tl.where(ranked, tl.load(end_ptr + token, mask=exists, other=0) - first, 0)
    if key_block * KEYS < tl.max(visible, 0):
        k = load_block(k_desc, first + key_block * KEYS, kv_head, KEYS, HEADS.BLOCK_QK)
        p = tl.zeros([QUERIES, KEYS], tl.float32)
        rows = row_addresses(tl.minimum(token, end_query - 1), kv_head * GROUP, HEADS.H)
        for head in tl.range(0, GROUP):
            q = load_block(q_desc, tile_start, kv_head * GROUP + head, QUERIES, HEADS.BLOCK_QK)
            lse = tl.load(lse_ptr + rows + head) * LOG2_E
            p += tl.exp2(tl.dot(q, k.T, input_precision=PRECISION) * scale_log2 - lse[:, None])
        i = key_block * KEYS + tl.arange(0, KEYS)
        p = tl.where(i[None, :] < visible[:, None], p, 0.0)
        BLOCKS: tl.constexpr = KEYS // R
        p, r, block = tl.reshape(p, [QUERIES, BLOCKS, R]), tl.arange(0, R), tl.arange(0, BLOCKS)
        row = wide(kv_head) * (end_query - first_query) + token - first_query
        spill = (row * tl.num_programs(0) + key_block) * (REACH * (REACH + 1) // 2)
        importance = tl.zeros([QUERIES, BLOCKS], tl.float32)
        for m in tl.static_range(REACH + 1):
            part = tl.sum(p * plane_weight(r, m, R, GEOMETRY.SPAN)[None, None, :], 2)  # A_m
            if m > 0:
                out = spill_ptr + spill[:, None] + (m * (m - 1) // 2 + m - BLOCKS + block)[None, :]
                tl.store(out, part, mask=exists[:, None] & (block >= BLOCKS - m)[None, :])
                source = tl.broadcast_to(tl.maximum(block - m, 0)[None, :], [QUERIES, BLOCKS])
                part = tl.where((block >= m)[None, :], tl.gather(part, source, 1), 0.0)
            importance += part
        j = key_block * BLOCKS + block
        tl.store(importance_ptr + (row * J)[:, None] + j[None, :], importance, mask=exists[:, None] & (j < J)[None, :])


@triton.jit
def best(bits, N: tl.constexpr):
    """Which N of a row of candidates are the largest, ties to the first, and the place of each among them.

    `bits` [M], -1 for none; FORCED comes first. Not negative floats order as their bits do. The N-th largest of the
    maxima of strided groups is reached by N candidates and, for small N, few more: from there the bound rises from one
    candidate to the next until fewer than N are above it.
    """
    M: tl.constexpr = bits.shape[0]
    GROUPS: tl.constexpr = M if (M < 128) | (N > 64) else 128  # neighbours, often alike, are in groups of their own
    low = _bound(tl.max(tl.reshape(bits, [M // GROUPS, GROUPS]), 0), N)
    above, following = _next(bits, low)
    while above >= N:
        low = following
        above, following = _next(bits, low)
    return _places(bits, low, low + 1, N)


@triton.jit
def _bound(bits, N: tl.constexpr):
    """By bisection a bound that N of the candidates reach, and no more if there is one so; 0 if they are fewer."""
    top = tl.max(tl.where(bits < FORCED, bits, -1), 0)
    low, high = top * 0, top + 1
    probe = tl.maximum(top - (1 << 23), 0)  # half of the largest: most often below the bound already
    while high - low > 1:
        count = tl.sum((bits >= probe).to(tl.int32), 0)
        low = tl.where(count >= N, probe, low)
        high = tl.where(count <= N, probe, high)
        probe = low + (high - low) // 2
    return low


@triton.jit
def _next(bits, low):
    """How many candidates are above a bound, and the lowest of them."""
    higher = bits > low
    return tl.sum(higher.to(tl.int32), 0), tl.min(tl.where(higher, bits, FORCED), 0)


@triton.jit
def best_soon(bits, N: tl.constexpr, PROBES: tl.constexpr):
    """`best` for a program that is alone: a round counts for PROBES bounds at a time, since it waits for all warps."""
    top = tl.max(tl.where(bits < FORCED, bits, -1), 0)
    low, high, i = top * 0, top + 1, tl.arange(0, PROBES)
    start, step = tl.maximum(top - (PROBES << 22), 0), top * 0 + (1 << 22)  # two for each halving of the largest
    while high - low > 1:
        probe = tl.minimum(start + (i + 1) * step, high - 1)
        count = tl.sum((bits[None, :] >= probe[:, None]).to(tl.int32), 1)
        low = tl.maximum(low, tl.max(tl.where(count >= N, probe, 0), 0))
        high = tl.minimum(high, tl.min(tl.where(count <= N, probe, high), 0))
        start, step = low, tl.maximum((high - low) // (PROBES + 1), 1)
    return _places(bits, low, high, N)


@triton.jit
def _places(bits, low, high, N: tl.constexpr):
    """The candidates from `high` on and the first of those from `low` on, N in all, and their places in order."""
    above = bits >= high
    tied = (bits >= low) & ~above
    missing = N - tl.sum(above.to(tl.int32), 0)
    so_far = tl.cumsum(above.to(tl.int32) + (tied.to(tl.int32) << 16), 0)  # two counts in one scan
    place = (so_far & 0xFFFF) + tl.minimum(so_far >> 16, missing) - 1
    return above | (tied & (so_far >> 16 <= missing)), place


@triton.jit
def _rank_kernel(
    importance_ptr,  # float32 [H_KV, Q, J]
    spill_ptr,  # float32 [H_KV, Q, tiles of keys, REACH * (REACH + 1) / 2]
    document_start_ptr, first_ptr, end_ptr,  # [T]
    best_bits_ptr, best_ptr,  # int32 [Q, H_KV, segments * SLOTS]
    indices_ptr,  # [T, H_KV, SLOTS]
    first_query, num_queries, J, tiles,
    H_KV: tl.constexpr, GEOMETRY: tl.constexpr, CHOICE: tl.constexpr, KEYS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program ranks a segment of the blocks of one query and KV head; where there is one segment it has chosen."""
    SLOTS: tl.constexpr = CHOICE.SLOTS
    BLOCK_SLOTS: tl.constexpr = CHOICE.BLOCK_SLOTS
    REACH: tl.constexpr = GEOMETRY.PLANES - 1
    TILE: tl.constexpr = KEYS // GEOMETRY.R  # blocks in a tile of keys
    query, kv_head, segment = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = first_query + query
    own = (token - tl.load(document_start_ptr + token)) // GEOMETRY.BLOCK_SIZE
    visible = tl.load(end_ptr + token) - tl.load(first_ptr + token)
    slot = tl.arange(0, BLOCK_SLOTS)
    row = wide(query) * H_KV + kv_head
    if own < SLOTS:
        out = (wide(token) * H_KV + kv_head) * SLOTS + slot
        tl.store(indices_ptr + out, tl.where(slot <= own, slot, -1), mask=(slot < SLOTS) & (segment == 0))
    else:
        j = segment * BLOCKS + tl.arange(0, BLOCKS)
        tile, within, from_row = j // TILE, j % TILE, wide(kv_head) * num_queries + query
        importance = tl.load(importance_ptr + from_row * J + j, mask=(tile * KEYS < visible) & (j < J), other=0.0)
        for m in tl.static_range(1, REACH + 1):
            spilled = (within < m) & (tile > 0) & ((tile - 1) * KEYS < visible)
            spill = spill_ptr + (from_row * tiles + tile - 1) * (REACH * (REACH + 1) // 2) + m * (m - 1) // 2
            importance += tl.load(spill + within, mask=spilled, other=0.0)
        forced = (j < CHOICE.INIT) | (j > own - CHOICE.LOCAL)
        bits = tl.minimum(tl.maximum(importance.to(tl.int32, bitcast=True), 0), FORCED - 1)  # even of NaN
        bits = tl.where(j <= own, tl.where(forced, FORCED, bits), -1)
        chosen, place = best(bits, SLOTS)
        if tl.num_programs(2) == 1:
            tl.store(indices_ptr + (wide(token) * H_KV + kv_head) * SLOTS + place, j, mask=chosen)
        else:
            out = (row * tl.num_programs(2) + segment) * SLOTS
            tl.store(best_bits_ptr + out + slot, tl.full([BLOCK_SLOTS], -1, tl.int32), mask=slot < SLOTS)
            tl.debug_barrier()
            tl.store(best_bits_ptr + out + place, bits, mask=chosen)
            tl.store(best_ptr + out + place, j, mask=chosen)


@triton.jit
def _merge_kernel(
    document_start_ptr,  # [T]
    best_bits_ptr, best_ptr,  # int32 [Q, H_KV, M]
    indices_ptr,  # [T, H_KV, SLOTS]
    first_query, M,
    H_KV: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program chooses among the best of all segments of one query and KV head."""
    query, kv_head = tl.program_id(0), tl.program_id(1)
    token = first_query + query
    if (token - tl.load(document_start_ptr + token)) // BLOCK_SIZE >= SLOTS:
        i = tl.arange(0, BLOCKS)
        candidates = (wide(query) * H_KV + kv_head) * M + i
        bits = tl.load(best_bits_ptr + candidates, mask=i < M, other=-1)
        chosen, place = best(bits, SLOTS)
        block = tl.load(best_ptr + candidates, mask=chosen, other=0)
        tl.store(indices_ptr + (wide(token) * H_KV + kv_head) * SLOTS + place, block, mask=chosen)


def _rank(
    importance: Tensor, spill: Tensor, document_start: Tensor, first: Tensor, end: Tensor, indices: Tensor, begin: int,
    keys: int, geometry: Geometry, choice: Choice,
) -> None:  # fmt: skip
    """Write the best blocks of the queries from `begin` on, by what tiles of so many keys gave and spilled."""
    (H_KV, Q, J), n = importance.shape, choice.SLOTS
    blocks = _SEGMENT if J > _SMALL_SEGMENT else _SMALL_SEGMENT
    segments = ceil_div(J, blocks)
    shape = (Q, H_KV, segments * n if segments > 1 else 0)
    best_bits, best = torch.empty(shape, dtype=torch.int32, device=importance.device), indices.new_empty(shape)
    _rank_kernel[(Q, H_KV, segments)](
        importance, spill, document_start, first, end, best_bits, best, indices, begin, Q, J, spill.shape[2],
        H_KV, geometry, choice, keys, blocks, num_warps=1,
    )  # fmt: skip
    if segments > 1:
        _merge_kernel[(Q, H_KV)](
            document_start, best_bits, best, indices, begin, segments * n,
            H_KV, n, geometry.BLOCK_SIZE, padded(segments * n), num_warps=1 if segments * n <= _SEGMENT else 4,
        )  # fmt: skip


def reach_of(compress_block_size: int, stride: int, block_size: int) -> int:
    """The largest m: how many blocks further a compression block that begins in a block may end."""
    return ceil_div(compress_block_size // stride - 1, block_size // stride)


@torch.library.custom_op("nsa_kernels::block_selection", mutates_args=())
def _block_selection(
    q: Tensor, compressed_k: Tensor, lse: Tensor, document_start: Tensor, first: Tensor, end: Tensor, sizes: list[int],
    scale: float, past: int,
) -> Tensor:  # fmt: skip
    """The n best blocks of each query; `first` and `end`: the run of summaries it sees; sizes: l, d, l', n, forced.

    With `past` tokens before the first query `document_start` is -past.
    """
    l, d, size, n, num_init, num_local = sizes  # noqa: E741
    (T, H, D), H_KV, R = q.shape, compressed_k.shape[1], size // d
    reach, slots = reach_of(l, d, size), filled_slots(n, size, past + T)
    geometry, choice = Geometry(l, d, size, reach + 1), Choice(slots, padded(slots), num_init, num_local)
    indices = torch.empty(T, H_KV, slots, dtype=torch.int32, device=q.device)
    tile = fitted_tile("importance", q, D, H // H_KV)
    queries = min(tile.rows, power_of_two(slots * size + 1) // 2)
    keys = max(tile.keys, R * power_of_two(max(reach, 1)))
    chunk = max(queries, _CHUNK_BYTES // (4 * H_KV * ceil_div(past + T, size)) // queries * queries)
    q_desc, k_desc = block_descriptor(q, queries), block_descriptor(compressed_k, keys)
    for begin in reversed(range(0, T, chunk)):  # the longest first: short ones are done sooner than launched
        stop = min(begin + chunk, T)
        J = (past + stop - 1) // size + 1
        tiles, rows = ceil_div(J * R, keys), (H_KV, stop - begin)
        importance = torch.empty(*rows, J, dtype=torch.float32, device=q.device)
        spill = importance.new_empty(*rows, tiles, reach * (reach + 1) // 2)
        if slots < J:
            _importance_kernel[(tiles, ceil_div(stop - begin, queries), H_KV)](
                q_desc, k_desc, lse, document_start, first, end, importance, spill,
                begin, stop, J, scale * LOG2_E.value, slots * size,
                heads_of(q, compressed_k), geometry, queries, keys, dot_precision(q.dtype), **tile.options,
            )  # fmt: skip
        _rank(importance, spill, document_start, first, end, indices, begin, keys, geometry, choice)
    return torch.nn.functional.pad(indices, (0, n - slots), value=-1) if slots < n else indices


@_block_selection.register_fake
def _(
    q: Tensor, compressed_k: Tensor, lse: Tensor, document_start: Tensor, first: Tensor, end: Tensor, sizes: list[int],
    scale: float, past: int,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape[0], compressed_k.shape[1], sizes[3], dtype=torch.int32, device=q.device)


def block_selection(
    q: Tensor,
    compressed_k: Tensor,
    lse: Tensor,
    config: NSAConfig,
    scale: float,
    layout: BatchLayout,
    past: int = 0,
) -> Tensor:
    """Choose n selection blocks for each query and KV head: the forced ones, then the most important.

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        lse: what `compressed_attention` returned, float32 [T, H].
        config: block sizes and counts.
        scale: factor of the scores, positive.
        layout: `batch_layout` of the batch.
        past: tokens of the one document that come before the first query; the layout then has them in its numbers.

    Returns:
        int32 [T, H_kv, n], ascending, then -1 in empty slots; relative to the query's document. No gradient.

    Source: arXiv:2502.11089, eq. 8-11.
    """
    config = config.within(past + q.shape[0])
    sizes = [
        config.compress_block_size,
        config.compress_stride,
        config.select_block_size,
        config.num_selected_blocks,
        config.num_init_blocks,
        config.num_local_blocks,
    ]
    runs = (layout.document_start, layout.first_summary, layout.end_summary)
    q, compressed_k = q.detach().contiguous(), compressed_k.detach().contiguous()
    return _block_selection(q, compressed_k, lse.detach(), *runs, sizes, scale, past)
