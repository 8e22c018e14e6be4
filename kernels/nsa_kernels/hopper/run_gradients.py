"""Gradients of keys and values that queries see in runs, written in Gluon for Hopper: see `triton/run_attention.py`.

A program walks the tiles of queries that see its keys in steps: first the edges of the run, where a mask is needed,
then the inner tiles.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from nsa_kernels.hopper.parts import (
    HIDDEN,
    LOG2_E,
    ROWS,
    Bounds,
    KeyTile,
    add_queries_to_dkv,
    cut,
    dkv_memory,
    find_step,
    load_key_block,
    start_dkv,
    store_keys,
    thread_barrier,
    tiles,
)
from nsa_kernels.packing import KeyRuns
from nsa_kernels.triton.arguments import Keys, heads_of
from nsa_kernels.triton.primitives import ceil_div
from nsa_kernels.triton.run_attention import RunGradients

# T packed tokens, S keys, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim.


class Queries(NamedTuple):
    """Queries and what backward knows of them."""

    q: Any  # copies tiles of [T, H * D_QK]
    do: Any  # copies tiles of [T, H * D_V]
    lse: Any  # [T, H]
    delta: Any
    num_tokens: Any


class SeenKeys(NamedTuple):
    """Keys, who sees them, and where their gradients go."""

    dk: Any  # [parts, S, H_KV, D]
    dv: Any
    seen_from: Any  # [S]
    seen_to: Any
    chunk_end: Any
    num_keys: Any
    part: Any


class Block(NamedTuple):
    """The keys of a program and the queries that it passes over."""

    steps: Any
    first_key: Any
    kv_head: Any
    first_head: Any


@gluon.jit
def _load_queries(queries, keys, key_block, ring, block, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: the block of keys once, then queries, do, lse and delta step by step."""
    load_key_block(block.first_key, block.kv_head, keys, key_block, HEADS)
    r = gl.arange(0, ROWS, gl.BlockedLayout([ROWS // 32], [32], [1], [0]))
    for i in range(block.steps.total):
        head, start = find_step(i, block.steps, ROWS)
        head += block.first_head
        stage = i % STAGES
        exists = start + r < queries.num_tokens
        rows = (start + r).to(gl.int64) * HEADS.H + head
        lse = gl.load(queries.lse + rows, mask=exists, other=-HIDDEN)  # p = 0 in rows that do not exist
        delta = gl.load(queries.delta + rows, mask=exists, other=0.0)
        mbarrier.wait(ring.empty.index(stage), i // STAGES & 1 ^ 1)
        full = ring.full.index(stage)
        mbarrier.expect(full, queries.q.block_type.nbytes + queries.do.block_type.nbytes)
        tma.async_copy_global_to_shared(queries.q, [start, head * HEADS.D_QK], full, ring.q.index(stage))
        tma.async_copy_global_to_shared(queries.do, [start, head * HEADS.D_V], full, ring.do.index(stage))
        ring.lse.index(stage).store(lse * LOG2_E)
        ring.delta.index(stage).store(delta)
        ring.token.index(stage).store(start + r)
        thread_barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def _multiply_keys(seen, key_block, ring, block, scale, HALF: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """A multiplying group: dk and dv of ROWS of the block's keys."""
    steps, num_keys, chunk_end = block.steps, seen.num_keys, seen.chunk_end
    first_key = block.first_key + HALF * ROWS
    k, v = key_block.k.slice(HALF * ROWS, ROWS), key_block.v.slice(HALF * ROWS, ROWS)
    grads = start_dkv(k, key_block, ring, HEADS)
    key = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, grads.products.type.layout))
    seen_from = gl.load(seen.seen_from + key, mask=key < num_keys, other=chunk_end)
    seen_to = gl.minimum(gl.load(seen.seen_to + key, mask=key < num_keys, other=0), chunk_end)
    keys, num_edges, scale_log2 = KeyTile(k, v, seen_from, seen_to), steps.num_edges, scale * LOG2_E
    grads = add_queries_to_dkv(grads, 0, num_edges, steps.total, keys, ring, scale_log2, True, STAGES)
    grads = add_queries_to_dkv(grads, num_edges, steps.total, steps.total, keys, ring, scale_log2, False, STAGES)
    row = (seen.part.to(gl.int64) * num_keys + first_key) * HEADS.H_KV + block.kv_head
    store_keys(seen.dk, grads.dk * scale, row, HEADS.H_KV, num_keys - first_key, HEADS.D_QK)
    store_keys(seen.dv, grads.dv, row, HEADS.H_KV, num_keys - first_key, HEADS.D_V)


@gluon.jit
def _dkv_kernel(
    q_desc, do_desc,  # [T, H * D]
    k_desc, v_desc,  # [S, H_KV * D]
    lse_ptr, delta_ptr,  # [T, H]
    seen_from_ptr, seen_to_ptr,  # [S]
    dk_ptr, dv_ptr,  # [GROUP / NUM_HEADS * chunks, S, H_KV, D]
    num_tokens, num_keys, chunk, scale,
    HEADS: gl.constexpr, NUM_HEADS: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program computes what one chunk of queries of NUM_HEADS heads gives to dk and dv of 2 * ROWS keys."""
    GROUP: gl.constexpr = HEADS.GROUP
    first_key, chunk_id = gl.program_id(0) * (2 * ROWS), gl.program_id(2)
    kv_head, head_part = gl.program_id(1) // (GROUP // NUM_HEADS), gl.program_id(1) % (GROUP // NUM_HEADS)
    key = first_key + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [num_warps], [0]))
    seen_from = gl.load(seen_from_ptr + key, mask=key < num_keys, other=num_tokens)
    seen_to = gl.load(seen_to_ptr + key, mask=key < num_keys, other=0)
    lo = gl.maximum(gl.min(seen_from, 0), chunk_id * chunk)
    hi = gl.minimum(gl.max(seen_to, 0), (chunk_id + 1) * chunk)
    if (lo >= hi) & (gl.num_programs(2) > 1):
        return
    steps = cut(Bounds(lo, gl.max(seen_from, 0), gl.minimum(gl.min(seen_to, 0), hi), hi), NUM_HEADS, ROWS)
    key_block, ring = dkv_memory(2 * ROWS, 2, q_desc.dtype, HEADS, STAGES)
    fence_async_shared()
    block = Block(steps, first_key, kv_head, kv_head * GROUP + head_part * NUM_HEADS)
    queries, keys = Queries(q_desc, do_desc, lse_ptr, delta_ptr, num_tokens), Keys(k_desc, v_desc)
    part = head_part * gl.num_programs(2) + chunk_id
    seen = SeenKeys(dk_ptr, dv_ptr, seen_from_ptr, seen_to_ptr, (chunk_id + 1) * chunk, num_keys, part)
    gl.warp_specialize(
        [
            (_multiply_keys, (seen, key_block, ring, block, scale, 0, HEADS, STAGES)),
            (_multiply_keys, (seen, key_block, ring, block, scale, 1, HEADS, STAGES)),
            (_load_queries, (queries, keys, key_block, ring, block, HEADS, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def launch_run_gradients_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, runs: KeyRuns, scale: float, split: bool
) -> RunGradients:
    """The parts of `dispatch.run_gradients` in Gluon.

    With `split` heads and queries are divided until the device is busy, and parts are float32; without it there is one
    part, in k's dtype.
    """
    (T, H, _), (S, H_KV, _) = q.shape, v.shape
    key_blocks, group_size = ceil_div(S, 2 * ROWS.value), H // H_KV
    wanted = ceil_div(_BUSY_PROGRAMS, key_blocks * H_KV) if split else 1
    head_parts = min(d for d in range(1, group_size + 1) if group_size % d == 0 and (d >= wanted or d == group_size))
    num_chunks = max(1, min(ceil_div(wanted, head_parts), T // _SHORTEST_CHUNK))
    chunk = ceil_div(T, num_chunks)
    num_chunks = ceil_div(T, chunk)
    dtype = torch.float32 if head_parts * num_chunks > 1 else k.dtype
    dk, dv = (x.new_empty(head_parts * num_chunks, *x.shape, dtype=dtype) for x in (k, v))
    rows, keys = ROWS.value, 2 * ROWS.value
    _dkv_kernel[(key_blocks, H_KV * head_parts, num_chunks)](
        tiles(q, rows), tiles(do, rows), tiles(k, keys), tiles(v, keys), lse, delta, runs.seen_from, runs.seen_to,
        dk, dv, T, S, chunk, scale, heads_of(q, v), group_size // head_parts, _STAGES, num_warps=4,
    )  # fmt: skip
    return RunGradients(dk, dv, chunk)


_STAGES = 2
_BUSY_PROGRAMS = 2048
"""Programs of unlike length that keep a Hopper GPU busy to the end."""
_SHORTEST_CHUNK = 1024
