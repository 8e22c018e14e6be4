"""Softmax attention where each query sees one run of keys: the kernels of the compressed and the sliding branch.

    o[t] = sum(softmax(q[t] · k[s] · scale) · v[s])   over   first[t] <= s < end[t]

    p[t, s] = exp(q[t] · k[s] · scale - lse[t]);   dv[s] = sum(p[t, s] · do[t])
    ds[t, s] = p[t, s] · (do[t] · v[s] - delta[t]);   dq[t] = scale · sum(ds · k),   dk[s] = scale · sum(ds · q)

where key s is seen by the queries seen_from[s] <= t < seen_to[s]. The compressed branch has a summary as a key, the
sliding branch a token. A gate g is folded into `lse` and `delta` (see `query_gradient.py`): all branches then read one
`do`.

Tiles at the edge of a run, where a mask is needed, may hold keys or queries of other documents. Infinity and NaN are
taken out of them before a product, for 0 times those is NaN, and put where they are seen.

Backward takes two passes, one over keys for dq and one over queries for dk and dv: nothing is added atomically, so
gradients are the same in every run. Where keys are few, the second pass is cut in chunks of queries and summed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.packing import KeyRuns
from nsa_kernels.triton.arguments import Keys, Runs, heads_of
from nsa_kernels.triton.primitives import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    block_descriptor,
    ceil_div,
    dot_precision,
    finite_part,
    load_block,
    load_rows,
    padded,
    row_addresses,
    softmax_end,
    softmax_step,
    spoil,
    store_rows,
    tile_rows,
    wide,
)
from nsa_kernels.triton.tuning import fitted_tile

# T packed tokens, S keys, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim.


class Span(NamedTuple):
    """Steps of [lo, a) and [b, hi)."""

    lo: Any
    a: Any
    b: Any
    hi: Any


class Softmax(NamedTuple):
    """An unfinished softmax of the rows of a tile."""

    row_max: Any  # [ROWS]
    row_sum: Any  # [ROWS]
    acc: Any  # [ROWS, BLOCK_V]


class QueryRows(NamedTuple):
    """The rows of a tile, and what backward knows of them."""

    q: Any  # [ROWS, BLOCK_QK]
    do: Any  # [ROWS, BLOCK_V]
    lse: Any  # [ROWS], in units of log2
    delta: Any  # [ROWS]


class Queries(NamedTuple):
    """All queries, and what backward knows of them."""

    q: Any  # [T, H, D_QK]
    do: Any  # [T, H, D_V]
    lse: Any  # [T, H]
    delta: Any  # [T, H]
    num_tokens: Any


class KeyRows(NamedTuple):
    """A block of keys, and the tokens from and up to which they are seen."""

    k: Any  # [KEYS, BLOCK_QK]
    v: Any  # [KEYS, BLOCK_V]
    seen_from: Any  # [KEYS]
    seen_to: Any  # [KEYS]


class KeyGradients(NamedTuple):
    """Gradients of a block of keys so far."""

    dk: Any  # [KEYS, BLOCK_QK]
    dv: Any  # [KEYS, BLOCK_V]


@triton.jit
def _cut(lo, inner_lo, inner_hi, hi, STEP: tl.constexpr):
    """Cut [lo, hi) into the steps where a mask is needed, and those that lie within [inner_lo, inner_hi)."""
    a = tl.minimum(lo + tl.cdiv(tl.maximum(inner_lo - lo, 0), STEP) * STEP, hi)
    b = a + tl.maximum(inner_hi - a, 0) // STEP * STEP
    return Span(lo, a, b, hi), Span(a, b, b, b)


@triton.jit
def _num_steps(span, STEP: tl.constexpr):
    """Steps of a span."""
    return tl.cdiv(span.a - span.lo, STEP) + tl.cdiv(span.hi - span.b, STEP)


@triton.jit
def _step_start(step, span, STEP: tl.constexpr):
    """Where a step of a span begins."""
    start = span.lo + step * STEP
    return tl.where(start < span.a, start, start + span.b - span.a)


@triton.jit
def _sees(start, runs, KEYS: tl.constexpr):
    """Which rows see which of KEYS keys from `start` on."""
    s = start + tl.arange(0, KEYS)
    return (s[None, :] >= runs.first[:, None]) & (s[None, :] < runs.end[:, None])


@triton.jit
def _attend_run(
    softmax, q, keys, span, runs, kv_head, scale_log2,
    HEADS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys of a span to a running softmax."""
    row_max, row_sum, acc = softmax
    for step in tl.range(0, _num_steps(span, KEYS)):
        start = _step_start(step, span, KEYS)
        k = load_block(keys.k, start, kv_head, KEYS, HEADS.BLOCK_QK)
        v = load_block(keys.v, start, kv_head, KEYS, HEADS.BLOCK_V)
        scores = tl.dot(q, k.T, input_precision=PRECISION)
        if MASKED:
            seen = _sees(start, runs, KEYS)
            scores = tl.where(seen, scores, HIDDEN)
            v, spoilt = finite_part(v)
            acc = spoil(acc, seen, spoilt)
        row_max, row_sum, acc = softmax_step(scores, v, scale_log2, row_max, row_sum, acc, PRECISION)
    return Softmax(row_max, row_sum, acc)


@triton.jit
def _forward_kernel(
    q_ptr,  # [T, H, D_QK]
    k_desc, v_desc,  # [S, H_KV, D]
    first_ptr, end_ptr,  # [T]
    o_ptr,  # [T, H, D_V]
    lse_ptr,  # [T, H]
    gates_ptr,  # [T, H, 3]; read if SUM
    compressed_ptr, selected_ptr, out_ptr,  # [T, H, D_V]; used if SUM
    num_tokens, scale_log2, SUM: tl.constexpr,
    HEADS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program attends the queries of one tile and one KV head; the last tiles, which see most keys, go first.

    With SUM it also writes the gated sum of the two other branches and this one.
    """
    D_V: tl.constexpr = HEADS.D_V
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    ROWS: tl.constexpr = TILE.ROWS
    tile, kv_head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    token, head, exists = tile_rows(tile * TILE.QUERIES, num_tokens, HEADS.GROUP, TILE.QUERIES, ROWS)
    rows = row_addresses(token, kv_head * HEADS.GROUP + head, HEADS.H)
    keys, runs = Keys(k_desc, v_desc), Runs(tl.load(first_ptr + token), tl.load(end_ptr + token))
    edges, inner = _cut(tl.min(runs.first, 0), tl.max(runs.first, 0), tl.min(runs.end, 0), tl.max(runs.end, 0),
                        TILE.KEYS)  # fmt: skip
    q = load_rows(q_ptr, rows, HEADS.D_QK, HEADS.BLOCK_QK)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    softmax = Softmax(tl.full([ROWS], LOWEST, tl.float32), tl.zeros([ROWS], tl.float32), acc)
    softmax = _attend_run(softmax, q, keys, inner, runs, kv_head, scale_log2, HEADS, TILE.KEYS, False, PRECISION)
    softmax = _attend_run(softmax, q, keys, edges, runs, kv_head, scale_log2, HEADS, TILE.KEYS, True, PRECISION)
    o, lse = softmax_end(softmax.row_max, softmax.row_sum, softmax.acc)
    store_rows(o_ptr, rows, exists, o, D_V, BLOCK_V)
    tl.store(lse_ptr + rows, lse, mask=exists)
    if SUM:
        out = o * tl.load(gates_ptr + 3 * rows + 2).to(tl.float32)[:, None]
        out += load_rows(compressed_ptr, rows, D_V, BLOCK_V) * tl.load(gates_ptr + 3 * rows).to(tl.float32)[:, None]
        out += load_rows(selected_ptr, rows, D_V, BLOCK_V) * tl.load(gates_ptr + 3 * rows + 1).to(tl.float32)[:, None]
        store_rows(out_ptr, rows, exists, out, D_V, BLOCK_V)


@triton.jit
def _add_keys_to_dq(
    dq, rows, keys, span, runs, kv_head, scale_log2,
    HEADS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds · k of the keys of a span to dq."""
    for step in tl.range(0, _num_steps(span, KEYS)):
        start = _step_start(step, span, KEYS)
        k = load_block(keys.k, start, kv_head, KEYS, HEADS.BLOCK_QK)
        v = load_block(keys.v, start, kv_head, KEYS, HEADS.BLOCK_V)
        p = tl.exp2(tl.dot(rows.q, k.T, input_precision=PRECISION) * scale_log2 - rows.lse[:, None])
        ds = p * (tl.dot(rows.do, v.T, input_precision=PRECISION) - rows.delta[:, None])
        if MASKED:
            ds = tl.where(_sees(start, runs, KEYS), ds, 0.0)
            k, _ = finite_part(k)  # of a key that is seen ds itself is not finite
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def add_runs_to_dq(
    dq, rows, keys, runs, token, kv_head, scale_log2,
    HEADS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds · k of the runs of keys that the queries of a tile see to dq."""
    own = Runs(tl.load(runs.first + token), tl.load(runs.end + token))
    edges, inner = _cut(tl.min(own.first, 0), tl.max(own.first, 0), tl.min(own.end, 0), tl.max(own.end, 0), KEYS)
    dq = _add_keys_to_dq(dq, rows, keys, inner, own, kv_head, scale_log2, HEADS, KEYS, False, PRECISION)
    return _add_keys_to_dq(dq, rows, keys, edges, own, kv_head, scale_log2, HEADS, KEYS, True, PRECISION)


@triton.jit
def _add_queries_to_dkv(
    grads, keys, queries, span, kv_head, scale_log2,
    HEADS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds · q and p · do of the queries of a span to dk and dv."""
    GROUP: tl.constexpr = HEADS.GROUP
    QUERIES: tl.constexpr = TILE.QUERIES
    dk, dv = grads
    for step in tl.range(0, _num_steps(span, QUERIES)):
        start = _step_start(step, span, QUERIES)
        token, head, exists = tile_rows(start, queries.num_tokens, GROUP, QUERIES, TILE.ROWS)
        rows = row_addresses(token, kv_head * GROUP + head, HEADS.H)
        q = load_rows(queries.q, rows, HEADS.D_QK, HEADS.BLOCK_QK)
        do = load_rows(queries.do, rows, HEADS.D_V, HEADS.BLOCK_V)
        lse = tl.load(queries.lse + rows, mask=exists, other=-HIDDEN) * LOG2_E  # p = 0 in rows that do not exist
        p = tl.exp2(tl.dot(keys.k, q.T, input_precision=PRECISION) * scale_log2 - lse[None, :])
        minus_delta = tl.broadcast_to(
            -tl.load(queries.delta + rows)[None, :], p.shape
        )  # as a start it spares registers
        if MASKED:
            sees = (token[None, :] >= keys.seen_from[:, None]) & (token[None, :] < keys.seen_to[:, None])
            p = tl.where(sees, p, 0.0)
            ds = tl.where(sees, p * tl.dot(keys.v, do.T, minus_delta, input_precision=PRECISION), 0.0)
            do, spoilt = finite_part(do)
            dv = spoil(dv, sees, spoilt)
            q, _ = finite_part(q)  # of a query that sees the key ds itself is not finite
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * tl.dot(keys.v, do.T, minus_delta, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return KeyGradients(dk, dv)


@triton.jit
def _dkv_kernel(
    q_ptr,  # [T, H, D_QK]
    k_ptr, v_ptr,  # [S, H_KV, D]
    do_ptr,  # [T, H, D_V]
    lse_ptr, delta_ptr,  # [T, H]
    seen_from_ptr, seen_to_ptr,  # [S]
    dk_ptr, dv_ptr,  # [chunks, S, H_KV, D]
    num_tokens, num_keys, chunk, scale,
    HEADS: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program computes what one chunk of queries gives to dk and dv of one block of keys."""
    H_KV: tl.constexpr = HEADS.H_KV
    BLOCK_QK: tl.constexpr = HEADS.BLOCK_QK
    BLOCK_V: tl.constexpr = HEADS.BLOCK_V
    KEYS: tl.constexpr = TILE.KEYS
    first_key, kv_head, chunk_id = tl.program_id(0) * KEYS, tl.program_id(1), tl.program_id(2)
    s = first_key + tl.arange(0, KEYS)
    exists = s < num_keys
    seen_from = tl.load(seen_from_ptr + s, mask=exists, other=num_tokens)
    seen_to = tl.load(seen_to_ptr + s, mask=exists, other=0)
    lo = tl.maximum(tl.min(seen_from, 0), chunk_id * chunk)
    hi = tl.minimum(tl.max(seen_to, 0), (chunk_id + 1) * chunk)
    if (lo < hi) | (tl.num_programs(2) == 1):
        edges, inner = _cut(lo, tl.max(seen_from, 0), tl.minimum(tl.min(seen_to, 0), hi), tl.maximum(hi, lo),
                            TILE.QUERIES)  # fmt: skip
        rows = row_addresses(tl.minimum(s, num_keys - 1), kv_head, H_KV)
        k, v = load_rows(k_ptr, rows, HEADS.D_QK, BLOCK_QK), load_rows(v_ptr, rows, HEADS.D_V, BLOCK_V)
        grads = KeyGradients(tl.zeros([KEYS, BLOCK_QK], tl.float32), tl.zeros([KEYS, BLOCK_V], tl.float32))
        scale_log2 = scale * LOG2_E
        keys = KeyRows(k, v, seen_from, tl.minimum(seen_to, hi))
        queries = Queries(q_ptr, do_ptr, lse_ptr, delta_ptr, num_tokens)
        grads = _add_queries_to_dkv(grads, keys, queries, inner, kv_head, scale_log2, HEADS, TILE, False, PRECISION)
        grads = _add_queries_to_dkv(grads, keys, queries, edges, kv_head, scale_log2, HEADS, TILE, True, PRECISION)
        out = (chunk_id.to(tl.int64) * num_keys + s) * H_KV + kv_head
        store_rows(dk_ptr, out, exists, grads.dk * scale, HEADS.D_QK, BLOCK_QK)
        store_rows(dv_ptr, out, exists, grads.dv, HEADS.D_V, BLOCK_V)


@triton.jit
def _sum_parts_kernel(
    parts_ptr,  # [parts, S, H_KV, D], of each key only the chunks that see it
    seen_from_ptr, seen_to_ptr,  # [S]
    out_ptr,  # [S, H_KV, D]
    num_keys, chunk, num_chunks, num_parts,
    H_KV: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program sums the parts of one block of keys of one head, in order; part i is of chunk i % num_chunks."""
    s, kv_head = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.program_id(1)
    column = tl.arange(0, BLOCK_D)
    exists = s < num_keys
    seen_from, seen_to = tl.load(seen_from_ptr + s, mask=exists), tl.load(seen_to_ptr + s, mask=exists, other=0)
    total = tl.zeros([KEYS, BLOCK_D], tl.float32)
    for i in range(num_parts):
        begin = i % num_chunks * chunk
        sees = exists & (begin < seen_to) & (begin + chunk > seen_from)
        rows = (wide(i) * num_keys + s) * H_KV + kv_head
        mask = sees[:, None] & (column[None, :] < D)
        total += tl.load(parts_ptr + rows[:, None] * D + column[None, :], mask=mask, other=0.0)
    store_rows(out_ptr, s.to(tl.int64) * H_KV + kv_head, exists, total, D, BLOCK_D)


class OtherBranches(NamedTuple):
    """What the last branch adds itself to."""

    gates: Tensor  # [T, H, 3]: compressed, selected, sliding
    compressed_o: Tensor  # [T, H, D_v]
    selected_o: Tensor  # [T, H, D_v]
    out: Tensor  # [T, H, D_v], written: the gated sum


class RunGradients(NamedTuple):
    """Gradients of keys and values in parts, part i of the queries of chunk i % (chunks)."""

    dk: Tensor  # [parts, S, H_kv, D_qk], of each key only the chunks that see it; float32 where there are several
    dv: Tensor  # [parts, S, H_kv, D_v]
    chunk: int  # queries in a chunk


def launch_run_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: KeyRuns, scale: float, stage: str, others: OtherBranches | None
) -> tuple[Tensor, Tensor]:
    """`dispatch.run_attention` in Triton."""
    (T, H, D_QK), (_, H_KV, D_V) = q.shape, v.shape
    o, lse = q.new_empty(T, H, D_V), q.new_empty(T, H, dtype=torch.float32)
    tile = fitted_tile(f"{stage}_forward", q, max(D_QK, D_V), H // H_KV)
    _forward_kernel[(ceil_div(T, tile.queries), H_KV)](
        q, block_descriptor(k, tile.keys), block_descriptor(v, tile.keys), runs.first, runs.end, o, lse,
        *(others or (None,) * 4), T, scale * LOG2_E.value, others is not None,
        heads_of(q, v), tile.sizes, dot_precision(q.dtype), **tile.options,
    )  # fmt: skip
    return o, lse


def launch_run_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, runs: KeyRuns, scale: float, stage: str,
    split: bool,
) -> RunGradients:  # fmt: skip
    """The parts of `dispatch.run_gradients` in Triton; with `split` queries are divided until the device is busy."""
    (T, H, D_QK), (S, H_KV, D_V) = q.shape, v.shape
    tile = fitted_tile(f"{stage}_dkv", q, max(D_QK, D_V), H // H_KV)
    key_blocks = ceil_div(S, tile.keys)
    most = min(_MAX_CHUNKS, _BUSY_PROGRAMS // (key_blocks * H_KV), ceil_div(T, tile.queries)) if split else 1
    chunk = ceil_div(ceil_div(T, max(1, most)), tile.queries) * tile.queries
    num_chunks = ceil_div(T, chunk)
    dtype = torch.float32 if num_chunks > 1 else k.dtype
    dk, dv = (x.new_empty(num_chunks, *x.shape, dtype=dtype) for x in (k, v))
    _dkv_kernel[(key_blocks, H_KV, num_chunks)](
        q, k, v, do, lse, delta, runs.seen_from, runs.seen_to, dk, dv, T, S, chunk, scale,
        heads_of(q, v), tile.sizes, dot_precision(q.dtype), **tile.options,
    )  # fmt: skip
    return RunGradients(dk, dv, chunk)


def sum_run_parts(
    gradients: RunGradients, k: Tensor, v: Tensor, runs: KeyRuns, num_queries: int
) -> tuple[Tensor, Tensor]:
    """dk and dv of so many queries, of the parts that see each key, in order."""
    *parts, chunk = gradients
    if len(parts[0]) == 1:
        return parts[0][0], parts[1][0]
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    for part, out in zip(parts, (dk, dv), strict=True):
        (S, H_KV, D), num_chunks = out.shape, ceil_div(num_queries, chunk)
        _sum_parts_kernel[(ceil_div(S, 16), H_KV)](
            part, runs.seen_from, runs.seen_to, out, S, chunk, num_chunks, len(part), H_KV, D, padded(D), 16
        )
    return dk, dv


_BUSY_PROGRAMS = 4096
"""Programs that keep any GPU busy to the end."""

_MAX_CHUNKS = 16
"""Most chunks of queries, so that partial sums stay small beside the inputs."""
