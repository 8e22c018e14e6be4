"""Softmax attention where each query sees one run of keys, written in Gluon for Hopper: see `triton/run_attention.py`.

A program walks the tiles of keys in steps: first the edges of the run, where a mask is needed, then the inner tiles.
The products of a step start before those of the step before have ended.
"""

from typing import Any, NamedTuple

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
    KeyRing,
    barriers,
    cut,
    find_step,
    load_bounds,
    load_keys,
    load_tile,
    resident_programs,
    rows_layout,
    softmax_end,
    softmax_step,
    thread_barrier,
    tile_rows,
    tiles,
)
from nsa_kernels.packing import KeyRuns
from nsa_kernels.triton.arguments import Keys, heads_of
from nsa_kernels.triton.primitives import ceil_div
from nsa_kernels.triton.run_attention import OtherBranches

# T packed tokens, S keys, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim.


class Items(NamedTuple):
    """What a launch attends: tiles of 2 * ROWS tokens, head by head."""

    first: Any  # [T], the run of keys that each token sees
    end: Any
    num_tokens: Any
    num_tiles: Any


class Item(NamedTuple):
    """A tile of one head."""

    first_token: Any
    head: Any
    steps: Any


class Memory(NamedTuple):
    """Shared memory of a program, and where its warps meet."""

    q: Any  # [2 * ROWS, D_QK]
    o: Any  # [2, ROWS, D_V]
    ring: Any
    q_full: Any
    q_empty: Any
    turn: Any


class Softmax(NamedTuple):
    """An unfinished softmax of ROWS queries, and the weights of its newest tile of keys."""

    p: Any
    acc: Any
    row_max: Any
    row_sum: Any


class Progress(NamedTuple):
    """What a multiplying group has behind it, and the keys that its queries see now."""

    done: Any  # steps of the items before
    turns: Any  # turns of the items before
    phase: Any  # of q's barriers
    steps: Any
    first: Any  # [ROWS]
    end: Any


@gluon.jit
def _item_place(item, num_tiles, H: gl.constexpr):
    """First token and head of an item; the last tiles, which see most keys, come first. Past the end: the last item."""
    item = gl.minimum(item, num_tiles * H - 1)
    return (num_tiles - 1 - item // H) * (2 * ROWS), item % H


@gluon.jit
def _item_bounds(item, items, H: gl.constexpr):
    """What the tokens of an item see."""
    first_token, _ = _item_place(item, items.num_tiles, H)
    last_token = gl.minimum(first_token + 2 * ROWS, items.num_tokens) - 1
    return load_bounds(items.first, items.end, first_token, last_token)


@gluon.jit
def _begin_item(item, bounds, items, H: gl.constexpr, KEYS: gl.constexpr):
    """An item, by its `_item_bounds`; and those of the next, loaded ahead."""
    first_token, head = _item_place(item, items.num_tiles, H)
    steps = cut(bounds, 1, KEYS)
    return Item(first_token, head, steps), _item_bounds(item + gl.num_programs(0), items, H)


@gluon.jit
def _load_forward(q_desc, keys, memory, items, HEADS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """The loading warp: of every item of the program the queries once, then keys and values step by step."""
    done, phase = 0, 0  # steps of the items before, and the phase of q's barriers
    bounds = _item_bounds(gl.program_id(0), items, HEADS.H)
    for i in range(gl.program_id(0), items.num_tiles * HEADS.H, gl.num_programs(0)):
        item, bounds = _begin_item(i, bounds, items, HEADS.H, KEYS)
        mbarrier.wait(memory.q_empty.index(0), phase ^ 1)
        mbarrier.expect(memory.q_full.index(0), q_desc.block_type.nbytes)
        place = [item.first_token, item.head * HEADS.D_QK]
        tma.async_copy_global_to_shared(q_desc, place, memory.q_full.index(0), memory.q)
        for step in range(item.steps.total):
            start = find_step(step, item.steps, KEYS).start
            load_keys(done + step, start, item.head // HEADS.GROUP, keys, memory.ring, HEADS, STAGES)
        done += item.steps.total
        phase ^= 1


@gluon.jit
def _hide(products, start, first, end, KEYS: gl.constexpr):
    """Scores of a tile of keys without those that a query does not see."""
    s = start + gl.arange(0, KEYS, gl.SliceLayout(0, products.type.layout))
    return gl.where((s[None, :] >= first[:, None]) & (s[None, :] < end[:, None]), products, HIDDEN)


@gluon.jit
def _attend(
    softmax, begin, stop, q, memory, progress, scale_log2,
    MASKED: gl.constexpr, HALF: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) of an item: p · v of the step before runs beside q · k of this one.

    The two groups take turns: one computes exponentials while the products of the other run.
    """
    p, acc, row_max, row_sum = softmax
    ring, turn = memory.ring, memory.turn
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    none = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    for i in range(begin, stop):
        step = progress.done + i
        stage, before = step % STAGES, (step - 1) % STAGES
        mbarrier.wait(ring.k_full.index(stage), step // STAGES & 1)
        mbarrier.wait(turn.index(HALF), progress.turns + i & 1 ^ HALF)
        products = warpgroup_mma(q, ring.k.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(ring.v_full.index(before), (step - 1) // STAGES & 1)
        acc = warpgroup_mma(p, ring.v.index(before), acc, is_async=True)
        mbarrier.arrive(turn.index(1 - HALF), count=1)
        products = warpgroup_mma_wait(1, deps=[products])
        mbarrier.arrive(ring.k_empty.index(stage), count=1)
        start = find_step(i, progress.steps, KEYS).start
        if MASKED:
            products = _hide(products, start, progress.first, progress.end, KEYS)
        new_p, row_max, row_sum, shrink = softmax_step(products, row_max, row_sum, scale_log2)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(ring.v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        p = gl.convert_layout(new_p.to(q.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    return Softmax(p, acc, row_max, row_sum)


@gluon.jit
def _load_others(others, first_token, head, num_tokens, H: gl.constexpr, D: gl.constexpr):
    """The finished branches of ROWS tokens of a head."""
    rows = tile_rows(first_token, num_tokens, head, H, 1, gl.SliceLayout(1, rows_layout(D))).row
    return load_tile(others.compressed_o, rows, D), load_tile(others.selected_o, rows, D)


@gluon.jit
def _store_gated_sum(others, finished, o_tile, first_token, head, num_tokens, H: gl.constexpr, D: gl.constexpr):
    """Add the finished branches to `o_tile`, each by its gate, and write the sum of ROWS tokens of a head."""
    compressed, selected = finished
    layout: gl.constexpr = rows_layout(D)
    _, rows, exists = tile_rows(first_token, num_tokens, head, H, 1, gl.SliceLayout(1, layout))
    gates = others.gates
    out = o_tile.load(layout).to(gl.float32) * gl.load(gates + 3 * rows + 2).to(gl.float32)[:, None]
    out += compressed.to(gl.float32) * gl.load(gates + 3 * rows).to(gl.float32)[:, None]
    out += selected.to(gl.float32) * gl.load(gates + 3 * rows + 1).to(gl.float32)[:, None]
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    out = out.to(others.out.dtype.element_ty)
    gl.store(others.out + rows[:, None] * D + column[None, :], out, mask=exists[:, None])


@gluon.jit
def _start_softmax(q, memory, progress, scale_log2, D_V: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr):
    """The first step of an item, at the edge of its run."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_V, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    ring, stage = memory.ring, progress.done % STAGES
    none = gl.zeros([ROWS, KEYS], gl.float32, s_layout)
    mbarrier.wait(memory.q_full.index(0), progress.phase)
    mbarrier.wait(ring.k_full.index(stage), progress.done // STAGES & 1)
    products = warpgroup_mma(q, ring.k.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(ring.k_empty.index(stage), count=1)
    row_max, row_sum = gl.full([ROWS], LOWEST, gl.float32, row), gl.zeros([ROWS], gl.float32, row)
    products = _hide(products, find_step(0, progress.steps, KEYS).start, progress.first, progress.end, KEYS)
    p, row_max, row_sum, _ = softmax_step(products, row_max, row_sum, scale_log2)
    p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return Softmax(p, gl.zeros([ROWS, D_V], gl.float32, o_layout), row_max, row_sum)


@gluon.jit
def _multiply_forward(
    o_desc, lse_ptr, others, memory, items, scale_log2, SUM: gl.constexpr,
    HALF: gl.constexpr, HEADS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: ROWS of the queries of every item of the program, from scores to stored outputs."""
    H: gl.constexpr = HEADS.H
    D_V: gl.constexpr = HEADS.D_V
    row: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16]))
    ring, num_tokens = memory.ring, items.num_tokens
    q, o_tile = memory.q.slice(HALF * ROWS, ROWS), memory.o.index(HALF)
    done, turns, phase = 0, 0, 0  # steps and turns of the items before, and the phase of q's barriers
    bounds = _item_bounds(gl.program_id(0), items, H)
    for i in range(gl.program_id(0), items.num_tiles * H, gl.num_programs(0)):
        item, bounds = _begin_item(i, bounds, items, H, KEYS)
        first_token, head, steps = item
        token = first_token + HALF * ROWS + gl.arange(0, ROWS, row)
        exists = token < num_tokens
        first = gl.load(items.first + token, mask=exists, other=0)
        end = gl.load(items.end + token, mask=exists, other=0)
        progress = Progress(done, turns, phase, steps, first, end)
        softmax = _start_softmax(q, memory, progress, scale_log2, D_V, KEYS, STAGES)
        num_edges = gl.maximum(steps.num_edges, 1)
        softmax = _attend(softmax, 1, num_edges, q, memory, progress, scale_log2, True, HALF, KEYS, STAGES)
        softmax = _attend(softmax, num_edges, steps.total, q, memory, progress, scale_log2, False, HALF, KEYS, STAGES)
        mbarrier.arrive(memory.q_empty.index(0), count=1)
        p, acc, row_max, row_sum = softmax
        done, turns, phase = done + steps.total, turns + steps.total - 1, phase ^ 1
        last = (done - 1) % STAGES
        finished = _load_others(others, first_token + HALF * ROWS, head, num_tokens, H, D_V) if SUM else None
        mbarrier.wait(ring.v_full.index(last), (done - 1) // STAGES & 1)
        acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(p, ring.v.index(last), acc, is_async=True)])
        mbarrier.arrive(ring.v_empty.index(last), count=1)
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
    HEADS: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Each program attends one item after another: 2 * ROWS tokens of one head.

    The next item's queries and keys are loaded while the last one ends. With SUM it also writes the gated sum of the
    two other branches and this one.
    """
    q = gl.allocate_shared_memory(q_desc.dtype, [2 * ROWS, HEADS.D_QK], q_desc.layout)
    o = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, HEADS.D_V], o_desc.layout)
    k = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, HEADS.D_QK], k_desc.layout)
    v = gl.allocate_shared_memory(q_desc.dtype, [STAGES, KEYS, HEADS.D_V], v_desc.layout)
    q_full, k_full, v_full = barriers(1, 1), barriers(STAGES, 1), barriers(STAGES, 1)
    q_empty, k_empty, v_empty, turn = barriers(1, 2), barriers(STAGES, 2), barriers(STAGES, 2), barriers(2, 1)
    fence_async_shared()
    memory = Memory(q, o, KeyRing(k, v, k_full, v_full, k_empty, v_empty), q_full, q_empty, turn)
    items = Items(first_ptr, end_ptr, num_tokens, num_tiles)
    others = OtherBranches(gates_ptr, compressed_ptr, selected_ptr, out_ptr)
    gl.warp_specialize(
        [
            (_multiply_forward, (o_desc, lse_ptr, others, memory, items, scale_log2, SUM, 0, HEADS, KEYS, STAGES)),
            (_multiply_forward, (o_desc, lse_ptr, others, memory, items, scale_log2, SUM, 1, HEADS, KEYS, STAGES)),
            (_load_forward, (q_desc, Keys(k_desc, v_desc), memory, items, HEADS, KEYS, STAGES)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip


def launch_run_attention_on_hopper(
    q: Tensor, k: Tensor, v: Tensor, runs: KeyRuns, scale: float, others: OtherBranches | None
) -> tuple[Tensor, Tensor]:
    """`dispatch.run_attention` in Gluon."""
    T, H, D_V = *q.shape[:2], v.shape[2]
    o, lse = q.new_empty(T, H, D_V), q.new_empty(T, H, dtype=torch.float32)
    num_tiles = ceil_div(T, 2 * ROWS.value)
    _forward_kernel[(resident_programs(num_tiles * H, q.device),)](
        tiles(q, 2 * ROWS.value), tiles(k, _KEYS), tiles(v, _KEYS), runs.first, runs.end, tiles(o, ROWS.value), lse,
        *(others or (None,) * 4), T, num_tiles, scale * LOG2_E.value, others is not None,
        heads_of(q, v), _KEYS, _STAGES, num_warps=4,
    )  # fmt: skip
    return o, lse


_KEYS = 128
_STAGES = 2
