"""Softmax attention where each query sees one run of keys, written in Gluon for Hopper: see `run_attention.py`.

A program walks the tiles of the other side in steps: first the edges of the run, where a mask is needed, then the inner
tiles. The products of a step start before those of the step before have ended.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.hopper.parts import (
    HIDDEN,
    LOG2_E,
    LOWEST,
    ROWS,
    add_queries_to_dkv,
    barriers,
    cut,
    load_bounds,
    load_keys,
    load_tile,
    place_of,
    resident_programs,
    ring,
    rows_layout,
    softmax_end,
    softmax_step,
    start_dkv,
    store_keys,
    thread_barrier,
    tile_rows,
    tiles,
)
from nsa_kernels.packing import KeyRuns
from nsa_kernels.triton.primitives import ceil_div
from nsa_kernels.triton.run_attention import OtherBranches, RunGradients

# T packed tokens, S keys, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim.


@gluon.jit
def _item_place(item, num_tiles, H: gl.constexpr):
    """First token and head of an item; the last tiles, which see most keys, come first. Past the end: the last item."""
    item = gl.minimum(item, num_tiles * H - 1)
    return (num_tiles - 1 - item // H) * (2 * ROWS), item % H


@gluon.jit
def _item_runs(item, first_ptr, end_ptr, num_tokens, num_tiles, H: gl.constexpr):
    """`load_bounds` of an item."""
    first_token, _ = _item_place(item, num_tiles, H)
    return load_bounds(first_ptr, end_ptr, first_token, gl.minimum(first_token + 2 * ROWS, num_tokens) - 1)


@gluon.jit
def _begin_item(item, own_runs, runs, num_tokens, num_tiles, H: gl.constexpr, KEYS: gl.constexpr):
    """First token, head and steps of an item by its `_item_runs`; and those of the next, loaded ahead."""
    first_token, head = _item_place(item, num_tiles, H)
    lo, inner_lo, inner_hi, hi = own_runs
    steps = cut(lo, inner_lo, inner_hi, hi, 1, KEYS)
    following = _item_runs(item + gl.num_programs(0), runs[0], runs[1], num_tokens, num_tiles, H)
    return first_token, head, steps, following


@gluon.jit
def _load_forward(
    inputs, shared, runs, num_tokens, num_tiles,
    H: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: of every item of the program the queries once, then keys and values step by step."""
    q_desc, k_desc, v_desc = inputs
    q_smem, _, k_smem, v_smem, q_full, q_empty, k_full, v_full, k_empty, v_empty, _ = shared
    done, phase = 0, 0  # steps of the items before, and the phase of q's barriers
    own_runs = _item_runs(gl.program_id(0), runs[0], runs[1], num_tokens, num_tiles, H)
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        first_token, head, steps, own_runs = _begin_item(item, own_runs, runs, num_tokens, num_tiles, H, KEYS)
        mbarrier.wait(q_empty.index(0), phase ^ 1)
        mbarrier.expect(q_full.index(0), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [first_token, head * D_QK], q_full.index(0), q_smem)
        for i in range(steps.total):
            start = place_of(i, steps, KEYS)[1]
            load_keys(done + i, start, k_desc, v_desc, head // GROUP, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
                      D_QK, D_V, STAGES)  # fmt: skip
        done += steps.total
        phase ^= 1


@gluon.jit
def _hide(products, start, first, end, KEYS: gl.constexpr):
    """Scores of a tile of keys without those that a query does not see."""
    s = start + gl.arange(0, KEYS, gl.SliceLayout(0, products.type.layout))
    return gl.where((s[None, :] >= first[:, None]) & (s[None, :] < end[:, None]), products, HIDDEN)


@gluon.jit
def _attend(
    softmax, begin, stop, q, rings, steps, done, turns, first, end, scale_log2,
    MASKED: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) of an item: p · v of the step before runs beside q · k of this one.

    The two groups take turns: one computes exponentials while the products of the other run. `done` steps and `turns`
    turns were those of the items before.
    """
    p, acc, row_max, row_sum = softmax
    k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn = rings
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    none = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    for i in range(begin, stop):
        step = done + i
        stage, before = step % STAGES, (step - 1) % STAGES
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        mbarrier.wait(turn.index(HALF), turns + i & 1 ^ HALF)
        products = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (step - 1) // STAGES & 1)
        acc = warpgroup_mma(p, v_smem.index(before), acc, is_async=True)
        mbarrier.arrive(turn.index(1 - HALF), count=1)
        products = warpgroup_mma_wait(1, deps=[products])
        mbarrier.arrive(k_empty.index(stage), count=1)
        start = place_of(i, steps, KEYS)[1]
        if MASKED:
            products = _hide(products, start, first, end, KEYS)
        new_p, row_max, row_sum, shrink = softmax_step(products, row_max, row_sum, scale_log2)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = gl.convert_layout(new_p.to(q.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return p, acc, row_max, row_sum


@gluon.jit
def _load_others(others, first_token, head, num_tokens, H: gl.constexpr, D: gl.constexpr):
    """The finished branches of ROWS tokens of a head."""
    _, compressed_ptr, selected_ptr, _ = others
    _, rows, _ = tile_rows(first_token, num_tokens, head, H, 1, gl.SliceLayout(1, rows_layout(D)))
    return load_tile(compressed_ptr, rows, D), load_tile(selected_ptr, rows, D)


@gluon.jit
def _store_gated_sum(others, finished, o_tile, first_token, head, num_tokens, H: gl.constexpr, D: gl.constexpr):
    """Add the finished branches to `o_tile`, each by its gate, and write the sum of ROWS tokens of a head."""
    gates_ptr, _, _, out_ptr = others
    compressed, selected = finished
    layout: gl.constexpr = rows_layout(D)
    _, rows, exists = tile_rows(first_token, num_tokens, head, H, 1, gl.SliceLayout(1, layout))
    out = o_tile.load(layout).to(gl.float32) * gl.load(gates_ptr + 3 * rows + 2).to(gl.float32)[:, None]
    out += compressed.to(gl.float32) * gl.load(gates_ptr + 3 * rows).to(gl.float32)[:, None]
    out += selected.to(gl.float32) * gl.load(gates_ptr + 3 * rows + 1).to(gl.float32)[:, None]
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    out = out.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + rows[:, None] * D + column[None, :], out, mask=exists[:, None])


@gluon.jit
def _multiply_forward(
    outputs, others, shared, runs, num_tokens, num_tiles, scale_log2, SUM: gl.constexpr,
    HALF: gl.constexpr, H: gl.constexpr, D_V: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: ROWS of the queries of every item of the program, from scores to stored outputs."""
    o_desc, lse_ptr = outputs
    q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full, k_empty, v_empty, turn = shared
    first_ptr, end_ptr = runs
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    none = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    rings = (k_smem, v_smem, k_full, v_full, k_empty, v_empty, turn)
    q, o_tile = q_smem.slice(HALF * ROWS, ROWS), o_smem.index(HALF)
    done, turns, phase = 0, 0, 0  # steps and turns of the items before, and the phase of q's barriers
    own_runs = _item_runs(gl.program_id(0), first_ptr, end_ptr, num_tokens, num_tiles, H)
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        first_token, head, steps, own_runs = _begin_item(item, own_runs, runs, num_tokens, num_tiles, H, KEYS)
        token = first_token + HALF * ROWS + gl.arange(0, ROWS, row)
        exists = token < num_tokens
        first = gl.load(first_ptr + token, mask=exists, other=0)
        end = gl.load(end_ptr + token, mask=exists, other=0)
        stage = done % STAGES
        mbarrier.wait(q_full.index(0), phase)
        mbarrier.wait(k_full.index(stage), done // STAGES & 1)
        products = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(stage), count=1)
        row_max, row_sum = gl.full([ROWS], LOWEST, gl.float32, row), gl.zeros([ROWS], gl.float32, row)
        products = _hide(products, place_of(0, steps, KEYS)[1], first, end, KEYS)
        p, row_max, row_sum, _ = softmax_step(products, row_max, row_sum, scale_log2)
        p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, o_layout, 2))
        softmax = (p, gl.zeros([ROWS, D_V], gl.float32, o_layout), row_max, row_sum)
        num_edges = gl.maximum(steps.num_edges, 1)
        softmax = _attend(softmax, 1, num_edges, q, rings, steps, done, turns, first, end, scale_log2, True, HALF, KEYS,
                          STAGES)  # fmt: skip
        softmax = _attend(softmax, num_edges, steps.total, q, rings, steps, done, turns, first, end, scale_log2, False,
                          HALF, KEYS, STAGES)  # fmt: skip
        mbarrier.arrive(q_empty.index(0), count=1)
        p, acc, row_max, row_sum = softmax
        done, turns, phase = done + steps.total, turns + steps.total - 1, phase ^ 1
        last = (done - 1) % STAGES
        finished = _load_others(others, first_token + HALF * ROWS, head, num_tokens, H, D_V) if SUM else None
        mbarrier.wait(v_full.index(last), (done - 1) // STAGES & 1)
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, v_smem.index(last), acc, is_async=True)])
        mbarrier.arrive(v_empty.index(last), count=1)
        o, lse = softmax_end(acc, row_max, row_sum)
        gl.store(lse_ptr + token.to(gl.int64) * H + head, lse, mask=exists)
        tma.store_wait(0)  # of the item before
        thread_barrier()
        o_tile.store(o.to(q.dtype))
        fence_async_shared()
        thread_barrier()
        tma.async_copy_shared_to_global(o_desc, [first_token + HALF * ROWS, head * D_V], o_tile)
        if SUM:
            _store_gated_sum(others, finished, o_tile, first_token + HALF * ROWS, head, num_tokens, H, D_V)
    tma.store_wait(0)


@gluon.jit
def _forward_kernel(
    q_desc,  # [T, H * D_QK]
    k_desc, v_desc,  # [S, H_KV * D]
    first_ptr, end_ptr,  # [T]
    o_desc,  # [T, H * D_V]
    lse_ptr,  # [T, H]
    gates_ptr,  # [T, H, 3]; read if SUM
    compressed_ptr, selected_ptr, out_ptr,  # [T, H, D_V]; used if SUM
    num_tokens, num_tiles, scale_log2, SUM: gl.constexpr,
    H: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, KEYS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Each program attends one item after another: 2 * ROWS tokens of one head.

    The next item's queries and keys are loaded while the last one ends. With SUM it also writes the gated sum of the
    two other branches and this one.
    """
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * ROWS, D_QK], q_desc.layout)
    o_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D_V], o_desc.layout)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, D_QK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, D_V], v_desc.layout)
    q_full, k_full, v_full = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_empty, k_empty, v_empty, turn = barriers(1, 2), barriers(STAGES, 2), barriers(STAGES, 2), barriers(2, 1)
    fence_async_shared()
    shared = (q_smem, o_smem, k_smem, v_smem, q_full, q_empty, k_full, v_full, k_empty, v_empty, turn)
    outputs, runs = (o_desc, lse_ptr), (first_ptr, end_ptr)
    others = (gates_ptr, compressed_ptr, selected_ptr, out_ptr)
    gl.warp_specialize(
        [
            (_multiply_forward, (outputs, others, shared, runs, num_tokens, num_tiles, scale_log2, SUM,
                                 0, H, D_V, KEYS, STAGES)),
            (_multiply_forward, (outputs, others, shared, runs, num_tokens, num_tiles, scale_log2, SUM,
                                 1, H, D_V, KEYS, STAGES)),
            (_load_forward, ((q_desc, k_desc, v_desc), shared, runs, num_tokens, num_tiles, H, GROUP, D_QK, D_V, KEYS,
                             STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


@gluon.jit
def _load_queries(
    inputs, shared, place,
    H: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: the block of keys once, then queries, do, lse and delta step by step."""
    q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, num_tokens = inputs
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, token_smem, kv_full, full, empty = shared
    steps, first_key, kv_head, first_head = place
    mbarrier.expect(kv_full.index(0), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [first_key, kv_head * D_QK], kv_full.index(0), k_smem)
    tma.async_copy_global_to_shared(v_desc, [first_key, kv_head * D_V], kv_full.index(0), v_smem)
    r = gl.arange(0, ROWS, gl.BlockedLayout([ROWS // 32], [32], [1], [0]))
    for i in range(steps.total):
        head, start = place_of(i, steps, ROWS)
        head += first_head
        stage = i % STAGES
        exists = start + r < num_tokens
        rows = (start + r).to(gl.int64) * H + head
        lse = gl.load(lse_ptr + rows, mask=exists, other=-HIDDEN)  # p = 0 in rows that do not exist
        delta = gl.load(delta_ptr + rows, mask=exists, other=0.0)
        mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)
        mbarrier.expect(full.index(stage), q_desc.block_type.nbytes + do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [start, head * D_QK], full.index(stage), q_smem.index(stage))
        tma.async_copy_global_to_shared(do_desc, [start, head * D_V], full.index(stage), do_smem.index(stage))
        lse_smem.index(stage).store(lse * LOG2_E)
        delta_smem.index(stage).store(delta)
        token_smem.index(stage).store(start + r)
        thread_barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _multiply_keys(
    outputs, shared, place,
    HALF: gl.constexpr, H_KV: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: dk and dv of ROWS of the block's keys."""
    dk_ptr, dv_ptr, seen_from_ptr, seen_to_ptr, chunk_end, num_keys, part, scale = outputs
    steps, first_key, kv_head, _ = place
    first_key += HALF * ROWS
    k, v = shared[0].slice(HALF * ROWS, ROWS), shared[1].slice(HALF * ROWS, ROWS)
    state = start_dkv(k, shared, D_QK, D_V)
    key = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, state[0].type.layout))
    seen_from = gl.load(seen_from_ptr + key, mask=key < num_keys, other=chunk_end)
    seen_to = gl.minimum(gl.load(seen_to_ptr + key, mask=key < num_keys, other=0), chunk_end)
    num_edges, scale_log2 = steps.num_edges, scale * LOG2_E
    state = add_queries_to_dkv(state, 0, num_edges, steps.total, k, v, shared, seen_from, seen_to, scale_log2, True,
                               STAGES)  # fmt: skip
    state = add_queries_to_dkv(state, num_edges, steps.total, steps.total, k, v, shared, seen_from, seen_to, scale_log2,
                               False, STAGES)  # fmt: skip
    _, dk, dv = state
    row = (part.to(gl.int64) * num_keys + first_key) * H_KV + kv_head
    store_keys(dk_ptr, dk * scale, row, H_KV, num_keys - first_key, D_QK)
    store_keys(dv_ptr, dv, row, H_KV, num_keys - first_key, D_V)


@gluon.jit
def _dkv_kernel(
    q_desc, do_desc,  # [T, H * D]
    k_desc, v_desc,  # [S, H_KV * D]
    lse_ptr, delta_ptr,  # [T, H]
    seen_from_ptr, seen_to_ptr,  # [S]
    dk_ptr, dv_ptr,  # [GROUP / HEADS * chunks, S, H_KV, D]
    num_tokens, num_keys, chunk, scale,
    H_KV: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr,
    STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """One program computes what one chunk of queries of HEADS heads gives to dk and dv of 2 * ROWS keys."""
    first_key, chunk_id = gl.program_id(0) * (2 * ROWS), gl.program_id(2)
    kv_head, head_part = gl.program_id(1) // (GROUP // HEADS), gl.program_id(1) % (GROUP // HEADS)
    key = first_key + gl.arange(0, 2 * ROWS, gl.BlockedLayout([1], [32], [num_warps], [0]))
    seen_from = gl.load(seen_from_ptr + key, mask=key < num_keys, other=num_tokens)
    seen_to = gl.load(seen_to_ptr + key, mask=key < num_keys, other=0)
    lo = gl.maximum(gl.min(seen_from, 0), chunk_id * chunk)
    hi = gl.minimum(gl.max(seen_to, 0), (chunk_id + 1) * chunk)
    if (lo >= hi) & (gl.num_programs(2) > 1):
        return
    steps = cut(lo, gl.max(seen_from, 0), gl.minimum(gl.min(seen_to, 0), hi), hi, HEADS, ROWS)
    k_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * ROWS, D_QK], k_desc.layout)
    v_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * ROWS, D_V], v_desc.layout)
    q_smem, do_smem, lse_smem, delta_smem, token_smem = ring(q_desc.dtype, D_QK, D_V, STAGES)
    kv_full, full, empty = barriers(1, 1), barriers(STAGES, 2), barriers(STAGES, 2)
    fence_async_shared()
    shared = (k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, token_smem, kv_full, full, empty)
    place = (steps, first_key, kv_head, kv_head * GROUP + head_part * HEADS)
    inputs = (q_desc, do_desc, k_desc, v_desc, lse_ptr, delta_ptr, num_tokens)
    part = head_part * gl.num_programs(2) + chunk_id
    outputs = (dk_ptr, dv_ptr, seen_from_ptr, seen_to_ptr, (chunk_id + 1) * chunk, num_keys, part, scale)
    gl.warp_specialize(
        [
            (_multiply_keys, (outputs, shared, place, 0, H_KV, D_QK, D_V, STAGES)),
            (_multiply_keys, (outputs, shared, place, 1, H_KV, D_QK, D_V, STAGES)),
            (_load_queries, (inputs, shared, place, H_KV * GROUP, D_QK, D_V, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def launch_run_attention_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, runs: KeyRuns, scale: float, others: OtherBranches | None
) -> tuple[Tensor, Tensor]:
    """`dispatch.run_attention` in Gluon."""
    (T, H, D_QK), (_, H_KV, D_V) = q.shape, v.shape
    o, lse = q.new_empty(T, H, D_V), q.new_empty(T, H, dtype=torch.float32)
    num_tiles = ceil_div(T, 2 * ROWS.value)
    _forward_kernel[(resident_programs(num_tiles * H, q.device),)](
        tiles(q, 2 * ROWS.value), tiles(k, _KEYS), tiles(v, _KEYS), runs.first, runs.end, tiles(o, ROWS.value), lse,
        *(others or (None,) * 4), T, num_tiles, scale * LOG2_E.value, others is not None,
        H, H // H_KV, D_QK, D_V, _KEYS, _STAGES, num_warps=4,
    )  # fmt: skip
    return o, lse


def launch_run_gradients_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor, runs: KeyRuns, scale: float, split: bool
) -> RunGradients:
    """The parts of `dispatch.run_gradients` in Gluon.

    With `split` heads and queries are divided until the device is busy, and parts are float32; without it there is one
    part, in k's dtype.
    """
    (T, H, D_QK), (S, H_KV, D_V) = q.shape, v.shape
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
        dk, dv, T, S, chunk, scale, H_KV, group_size, group_size // head_parts, D_QK, D_V, _STAGES, num_warps=4,
    )  # fmt: skip
    return RunGradients(dk, dv, chunk)


_KEYS = 128
_STAGES = 2
_BUSY_PROGRAMS = 2048
"""Programs of unlike length that keep a Hopper GPU busy to the end."""
_SHORTEST_CHUNK = 1024
