"""dq through all branches at once, written in Gluon for Hopper: see `triton/query_gradient.py`."""

from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_kernels.hopper.block_attention import load_union, union_of, union_step
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
    thread_barrier,
    tile_rows,
    tiles,
)
from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.arguments import Branches, Keys, Runs, heads_of
from nsa_kernels.triton.block_lists import UnionTable, unite
from nsa_kernels.triton.primitives import ceil_div
from nsa_kernels.triton.query_gradient import Attended, QueryGradient

# T packed tokens, S keys of a branch, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim.


class Seen(NamedTuple):
    """What the queries see: two runs and the blocks that they chose."""

    compressed: Any
    sliding: Any
    unions: Any
    num_tokens: Any
    num_tiles: Any


class Walk(NamedTuple):
    """How a tile walks what it sees, in this order."""

    compressed: Any  # Steps
    sliding: Any  # Steps
    union: Any


class Tensors(NamedTuple):
    """What a multiplying group reads by itself."""

    q: Any  # [T, H, D_QK]
    do: Any  # [T, H, D_V]
    gates: Any  # [T, H, 3]
    o: Any  # Branches of [T, H, D_V]
    lse: Any  # Branches of [T, H]


class Gradients(NamedTuple):
    """What a multiplying group writes."""

    gates: Any  # [T, H, 3]
    delta: Any  # float32 [3, T, H]
    shifted: Any  # float32 [3, T, H]
    q: Any  # [T, H, D_QK]


class Memory(NamedTuple):
    """Shared memory of one tile."""

    q: Any  # [ROWS, D_QK]
    do: Any  # [ROWS, D_V]
    ring: Any


class Gated(NamedTuple):
    """A branch with its gate folded in: what p and ds of ROWS queries take, in units of log2."""

    lse: Any
    delta: Any


class Progress(NamedTuple):
    """Steps that a group has behind it, and where those of its tile end."""

    first_step: Any
    total: Any


class TileGradient(NamedTuple):
    """dq of ROWS queries so far, and q · k of the next step."""

    products: Any
    dq: Any


@gluon.jit
def _load_run(first_step, steps, kv_head, keys, ring, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Load the keys and values of a run, ROWS of them in a step."""
    for i in range(steps.total):
        load_keys(first_step + i, find_step(i, steps, ROWS).start, kv_head, keys, ring, HEADS, STAGES)


@gluon.jit
def _item_of(lap):
    """The program's item in a lap; every second lap runs against the programs, so that all have as much to do."""
    along = gl.where(lap % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
    return lap * gl.num_programs(0) + along


@gluon.jit
def _count_laps(num_tiles, H_KV: gl.constexpr):
    """Laps of the program; an item is a pair of tiles of a KV head, and the last lap may not have one for all."""
    items = gl.cdiv(num_tiles, 2) * H_KV
    full = items // gl.num_programs(0)
    return full + gl.where(_item_of(full) < items, 1, 0)


@gluon.jit
def _find_tile(lap, num_tiles, HALF: gl.constexpr):
    """Tile and KV head of a group in a lap; the last tiles, which see most, go first."""
    pairs, item = gl.cdiv(num_tiles, 2), _item_of(lap)
    return 2 * (pairs - 1 - item % pairs) + HALF, item // pairs


@gluon.jit
def _find_walk(tile, kv_head, seen, HEADS: gl.constexpr):
    """How a tile walks the compressed and the sliding run, and its union; runs ascend from token to token."""
    QUERIES: gl.constexpr = ROWS // HEADS.GROUP
    first_token = gl.minimum(tile * QUERIES, seen.num_tokens - 1)
    last_token = gl.minimum(tile * QUERIES + QUERIES, seen.num_tokens) - 1
    compressed = cut(load_bounds(seen.compressed.first, seen.compressed.end, first_token, last_token), 1, ROWS)
    sliding = cut(load_bounds(seen.sliding.first, seen.sliding.end, first_token, last_token), 1, ROWS)
    return Walk(compressed, sliding, union_of(tile, kv_head, seen.num_tiles, seen.unions, HEADS.H_KV))


@gluon.jit
def _load(keys, seen, memory, HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr):
    """A loading warp: the keys and values that the tiles of its group see, branch by branch."""
    ring, step = memory.ring, 0
    for lap in range(_count_laps(seen.num_tiles, HEADS.H_KV)):
        tile, kv_head = _find_tile(lap, seen.num_tiles, HALF)
        walk = _find_walk(tile, kv_head, seen, HEADS)
        _load_run(step, walk.compressed, kv_head, keys.compressed, ring, HEADS, STAGES)
        step += walk.compressed.total
        _load_run(step, walk.sliding, kv_head, keys.sliding, ring, HEADS, STAGES)
        step += walk.sliding.total
        load_union(step, walk.union, kv_head, keys.selected, ring, HEADS, BLOCK_SIZE, STAGES)
        step += walk.union.size * (BLOCK_SIZE // ROWS)


@gluon.jit
def _fold_gate(
    tensors, grads, o_ptr, lse_ptr, do, rows, exists, branch, BRANCH: gl.constexpr, D: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """delta = o · do, the gate's gradient, and lse - ln(gate) of a branch; a gate of 0 shifts so far that p is 0."""
    delta = gl.sum(load_tile(o_ptr, rows, D).to(gl.float32) * do, 1)
    gate = gl.load(tensors.gates + BRANCH + 3 * rows).to(gl.float32)
    shifted = gl.where(gate == 0, -HIDDEN, gl.load(lse_ptr + rows) - gl.log(gate))  # NaN where it is negative
    gl.store(grads.delta + BRANCH * branch + rows, delta, mask=exists)
    gl.store(grads.shifted + BRANCH * branch + rows, shifted, mask=exists)
    gl.store(grads.gates + BRANCH + 3 * rows, delta.to(grads.gates.dtype.element_ty), mask=exists)
    return Gated(gl.convert_layout(shifted * LOG2_E, LAYOUT), gl.convert_layout(delta, LAYOUT))


@gluon.jit
def _add_run(
    state, begin, stop, progress, gated, runs, steps, memory, scale_log2,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) of a run add ds · k to dq."""
    products, dq = state
    s_layout: gl.constexpr = products.type.layout
    for i in range(begin, stop):
        dp = _start_step(progress.first_step + i, s_layout, memory, STAGES)
        p = gl.exp2(products * scale_log2 - gated.lse[:, None])
        if MASKED:
            s = find_step(i, steps, ROWS).start + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
            p = gl.where((s[None, :] >= runs.first[:, None]) & (s[None, :] < runs.end[:, None]), p, 0.0)
        products, dq = _end_step(progress.first_step + i, progress.total, p, dp, gated.delta, dq, memory, STAGES)
    return TileGradient(products, dq)


@gluon.jit
def _add_union(
    state, union, progress, gated, token, first_token, query, memory, scale_log2,
    BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The blocks of a tile's union add ds · k to dq."""
    products, dq = state
    s_layout: gl.constexpr = products.type.layout
    runs = union.size * (BLOCK_SIZE // ROWS)
    start, chosen = union_step(union, 0, gl.maximum(runs, 1), BLOCK_SIZE)
    for i in range(runs):
        dp = _start_step(progress.first_step + i, s_layout, memory, STAGES)
        next_start, next_chosen = union_step(union, i + 1, runs, BLOCK_SIZE)
        p = gl.exp2(products * scale_log2 - gl.where((chosen >> query) & 1 != 0, gated.lse, -LOWEST)[:, None])
        if start + ROWS > first_token + 1:  # only then has the block keys after one of the queries
            s = start + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
            p = gl.where(s[None, :] <= token[:, None], p, 0.0)
        products, dq = _end_step(progress.first_step + i, progress.total, p, dp, gated.delta, dq, memory, STAGES)
        start, chosen = next_start, next_chosen
    return TileGradient(products, dq)


@gluon.jit
def _start_step(i, S_LAYOUT: gl.constexpr, memory, STAGES: gl.constexpr):
    """Start do · v of a step."""
    stage = i % STAGES
    mbarrier.wait(memory.ring.v_full.index(stage), i // STAGES & 1)
    none = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    v = memory.ring.v.index(stage).permute((1, 0))
    return warpgroup_mma(memory.do, v, none, use_acc=False, is_async=True)


@gluon.jit
def _end_step(i, total, p, dp, delta, dq, memory, STAGES: gl.constexpr):
    """Add ds · k to dq while q · k of the next step runs."""
    s_layout: gl.constexpr = p.type.layout
    q, ring, stage = memory.q, memory.ring, i % STAGES
    ds = p * (warpgroup_mma_wait(0, deps=[dp]) - delta[:, None])
    mbarrier.arrive(ring.v_empty.index(stage), count=1)
    ds = gl.convert_layout(ds.to(q.dtype), gl.DotOperandLayout(0, dq.type.layout, 2))
    dq = warpgroup_mma(ds, ring.k.index(stage), dq, is_async=True)
    following = gl.minimum(i + 1, total - 1)
    mbarrier.wait(ring.k_full.index(following % STAGES), following // STAGES & 1)
    none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
    k = ring.k.index(following % STAGES).permute((1, 0))
    products = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    mbarrier.arrive(ring.k_empty.index(stage), count=1)
    return TileGradient(warpgroup_mma_wait(0, deps=[products]), dq)


@gluon.jit
def _load_tile(tensors, memory, first_token, num_tokens, kv_head, HEADS: gl.constexpr):
    """Bring q and do of a tile to shared memory; do as float32, and the rows that it is of."""
    H: gl.constexpr = HEADS.H
    GROUP: gl.constexpr = HEADS.GROUP
    q_rows: gl.constexpr = gl.SliceLayout(1, rows_layout(HEADS.D_QK))
    do_rows: gl.constexpr = gl.SliceLayout(1, rows_layout(HEADS.D_V))
    memory.q.store(load_tile(tensors.q, tile_rows(first_token, num_tokens, kv_head, H, GROUP, q_rows).row, HEADS.D_QK))
    rows = tile_rows(first_token, num_tokens, kv_head, H, GROUP, do_rows)
    do = load_tile(tensors.do, rows.row, HEADS.D_V)
    memory.do.store(do)
    fence_async_shared()
    return do.to(gl.float32), rows


@gluon.jit
def _fold_gates(tensors, grads, do, rows, num_tokens, HEADS: gl.constexpr, LAYOUT: gl.constexpr):
    """`_fold_gate` of each branch."""
    D_V: gl.constexpr = HEADS.D_V
    _, row, exists = rows
    o, lse = tensors.o, tensors.lse
    branch = gl.to_tensor(num_tokens).to(gl.int64) * HEADS.H
    compressed = _fold_gate(tensors, grads, o.compressed, lse.compressed, do, row, exists, branch, 0, D_V, LAYOUT)
    selected = _fold_gate(tensors, grads, o.selected, lse.selected, do, row, exists, branch, 1, D_V, LAYOUT)
    sliding = _fold_gate(tensors, grads, o.sliding, lse.sliding, do, row, exists, branch, 2, D_V, LAYOUT)
    return Branches(compressed, selected, sliding)


@gluon.jit
def _add_whole_run(state, progress, gated, runs, steps, token, memory, scale_log2, STAGES: gl.constexpr):
    """A run adds ds · k to dq: its edges, then its inner tiles."""
    own = Runs(gl.load(runs.first + token), gl.load(runs.end + token))
    state = _add_run(state, 0, steps.num_edges, progress, gated, own, steps, memory, scale_log2, True, STAGES)
    return _add_run(
        state, steps.num_edges, steps.total, progress, gated, own, steps, memory, scale_log2, False, STAGES
    )  # fmt: skip


@gluon.jit
def _multiply(
    tensors, grads, seen, memory, scale,
    HALF: gl.constexpr, HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: dq of one tile after another, and on the way what the kernels of dk and dv need."""
    GROUP: gl.constexpr = HEADS.GROUP
    D_QK: gl.constexpr = HEADS.D_QK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_QK, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    ring, num_tokens = memory.ring, seen.num_tokens
    scale_log2 = scale * LOG2_E
    step = 0
    for lap in range(_count_laps(seen.num_tiles, HEADS.H_KV)):
        tile, kv_head = _find_tile(lap, seen.num_tiles, HALF)
        walk = _find_walk(tile, kv_head, seen, HEADS)
        first_token = tile * (ROWS // GROUP)
        thread_barrier()  # no warp of the group multiplies the queries of the tile before any more
        do, rows = _load_tile(tensors, memory, first_token, num_tokens, kv_head, HEADS)
        gated = _fold_gates(tensors, grads, do, rows, num_tokens, HEADS, row)
        token = tile_rows(first_token, num_tokens, kv_head, HEADS.H, GROUP, row).token
        thread_barrier()
        stage = step % STAGES
        mbarrier.wait(ring.k_full.index(stage), step // STAGES & 1)
        none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
        products = warpgroup_mma(memory.q, ring.k.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        state = TileGradient(warpgroup_mma_wait(0, deps=[products]), gl.zeros([ROWS, D_QK], gl.float32, dq_layout))
        total = step + walk.compressed.total + walk.sliding.total + walk.union.size * (BLOCK_SIZE // ROWS)
        state = _add_whole_run(state, Progress(step, total), gated.compressed, seen.compressed, walk.compressed, token,
                               memory, scale_log2, STAGES)  # fmt: skip
        step += walk.compressed.total
        state = _add_whole_run(state, Progress(step, total), gated.sliding, seen.sliding, walk.sliding, token,
                               memory, scale_log2, STAGES)  # fmt: skip
        step += walk.sliding.total
        query = gl.arange(0, ROWS, row) // GROUP
        dq = _add_union(state, walk.union, Progress(step, total), gated.selected, token, first_token, query, memory,
                        scale_log2, BLOCK_SIZE, STAGES).dq  # fmt: skip
        step = total
        _, own, exists = tile_rows(first_token, num_tokens, kv_head, HEADS.H, GROUP, gl.SliceLayout(1, dq_layout))
        column = gl.arange(0, D_QK, gl.SliceLayout(0, dq_layout))
        dq = (dq * scale).to(grads.q.dtype.element_ty)
        gl.store(grads.q + own[:, None] * D_QK + column[None, :], dq, mask=exists[:, None])


@gluon.jit
def _tile_memory(DTYPE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory and barriers of one tile."""
    D_QK: gl.constexpr = HEADS.D_QK
    D_V: gl.constexpr = HEADS.D_V
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_QK], DTYPE)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_V], DTYPE)
    q = gl.allocate_shared_memory(DTYPE, [ROWS, D_QK], k_layout)
    do = gl.allocate_shared_memory(DTYPE, [ROWS, D_V], v_layout)
    k = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_QK], k_layout)
    v = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_V], v_layout)
    k_full, v_full = barriers(STAGES, 1), barriers(STAGES, 1)
    return Memory(q, do, KeyRing(k, v, k_full, v_full, barriers(STAGES, 1), barriers(STAGES, 1)))


@gluon.jit
def _dq_kernel(
    q_ptr,  # [T, H, D_QK]
    do_ptr,  # [T, H, D_V]
    gates_ptr, grad_gates_ptr,  # [T, H, 3]
    compressed_k, compressed_v,  # [C, H_KV * D]
    selected_k, selected_v, sliding_k, sliding_v,  # [T, H_KV * D]
    compressed_o_ptr, selected_o_ptr, sliding_o_ptr,  # [T, H, D_V]
    compressed_lse_ptr, selected_lse_ptr, sliding_lse_ptr,  # [T, H]
    compressed_first_ptr, compressed_end_ptr, window_first_ptr, window_end_ptr,  # [T]
    start_ptr, mask_ptr,  # [tiles, H_KV, U]
    size_ptr,  # [tiles, H_KV]
    delta_ptr, shifted_ptr,  # float32 [3, T, H]
    dq_ptr,  # [T, H, D_QK]
    num_tokens, num_tiles, U, scale,
    HEADS: gl.constexpr, BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A program computes dq of pairs of neighbouring tiles of one KV head, a group one tile of each pair."""
    memory_a = _tile_memory(compressed_k.dtype, HEADS, STAGES)
    memory_b = _tile_memory(compressed_k.dtype, HEADS, STAGES)
    fence_async_shared()
    keys = Branches(Keys(compressed_k, compressed_v), Keys(selected_k, selected_v), Keys(sliding_k, sliding_v))
    compressed, sliding = Runs(compressed_first_ptr, compressed_end_ptr), Runs(window_first_ptr, window_end_ptr)
    seen = Seen(compressed, sliding, UnionTable(start_ptr, mask_ptr, size_ptr, U), num_tokens, num_tiles)
    o = Branches(compressed_o_ptr, selected_o_ptr, sliding_o_ptr)
    lse = Branches(compressed_lse_ptr, selected_lse_ptr, sliding_lse_ptr)
    tensors = Tensors(q_ptr, do_ptr, gates_ptr, o, lse)
    grads = Gradients(grad_gates_ptr, delta_ptr, shifted_ptr, dq_ptr)
    gl.warp_specialize(
        [
            (_multiply, (tensors, grads, seen, memory_a, scale, 0, HEADS, BLOCK_SIZE, STAGES)),
            (_multiply, (tensors, grads, seen, memory_b, scale, 1, HEADS, BLOCK_SIZE, STAGES)),
            (_load, (keys, seen, memory_a, 0, HEADS, BLOCK_SIZE, STAGES)),
            (_load, (keys, seen, memory_b, 1, HEADS, BLOCK_SIZE, STAGES)),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


def launch_query_gradient_on_hopper(
    forward: Attended, do: Tensor, where: BatchLayout, block_size: int, scale: float, out: QueryGradient
) -> None:
    """`dispatch.query_gradient` in Gluon."""
    q, gates, pairs, block_indices, o, lse = forward
    T, H, H_KV = *q.shape[:2], pairs[1].shape[1]
    unions = unite(block_indices, where.document_start, block_size, ROWS.value * H_KV // H)
    num_tiles = unions.size.shape[0]
    _dq_kernel[(resident_programs(ceil_div(num_tiles, 2) * H_KV, q.device),)](
        q, do, gates, out.gates, *(tiles(x, ROWS.value) for x in pairs), *o, *lse,
        *where.compressed_runs[:2], *where.sliding_runs[:2], *unions, out.delta, out.lse, out.dq,
        T, num_tiles, unions.start.shape[-1], scale,
        heads_of(q, pairs[1]), block_size, _STAGES, num_warps=4,
    )  # fmt: skip


_STAGES = 2
