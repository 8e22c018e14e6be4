"""dq through all branches at once, written in Gluon for Hopper: see `triton/query_gradient.py`."""

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
    barriers,
    cut,
    load_bounds,
    load_keys,
    load_tile,
    place_of,
    resident_programs,
    rows_layout,
    thread_barrier,
    tile_rows,
    tiles,
)
from nsa_kernels.packing import BatchLayout
from nsa_kernels.triton.block_lists import unite
from nsa_kernels.triton.primitives import ceil_div
from nsa_kernels.triton.query_gradient import Attended, QueryGradient

# T packed tokens, S keys of a branch, H query heads, H_kv KV heads, G = H / H_kv (GROUP), D head dim.


@gluon.jit
def _load_run(
    first_step, steps, k_desc, v_desc, kv_head, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
    D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and values of a run, ROWS of them in a step."""
    for i in range(steps.total):
        start = place_of(i, steps, ROWS)[1]
        load_keys(first_step + i, start, k_desc, v_desc, kv_head, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
                  D_QK, D_V, STAGES)  # fmt: skip


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
def _find_walk(tile, kv_head, runs, unions, num_tokens, num_tiles, H_KV: gl.constexpr, GROUP: gl.constexpr):
    """How a tile walks the compressed and the sliding run, and its union; runs ascend from token to token."""
    first_token = gl.minimum(tile * (ROWS // GROUP), num_tokens - 1)
    last_token = gl.minimum(tile * (ROWS // GROUP) + ROWS // GROUP, num_tokens) - 1
    lo, inner_lo, inner_hi, hi = load_bounds(runs[0], runs[1], first_token, last_token)
    compressed = cut(lo, inner_lo, inner_hi, hi, 1, ROWS)
    lo, inner_lo, inner_hi, hi = load_bounds(runs[2], runs[3], first_token, last_token)
    sliding = cut(lo, inner_lo, inner_hi, hi, 1, ROWS)
    return compressed, sliding, union_of(tile, kv_head, num_tiles, unions[0], unions[1], unions[2], unions[3], H_KV)


@gluon.jit
def _load(
    descriptors, runs, unions, shared, num_tokens, num_tiles,
    HALF: gl.constexpr, H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A loading warp: the keys and values that the tiles of its group see, branch by branch."""
    compressed_k, compressed_v, sliding_k, sliding_v, selected_k, selected_v = descriptors
    k_smem, v_smem, k_full, v_full, k_empty, v_empty = shared[2:]
    step = 0
    for lap in range(_count_laps(num_tiles, H_KV)):
        tile, kv_head = _find_tile(lap, num_tiles, HALF)
        compressed, sliding, union = _find_walk(tile, kv_head, runs, unions, num_tokens, num_tiles, H_KV, GROUP)
        _load_run(step, compressed, compressed_k, compressed_v, kv_head, k_smem, v_smem, k_full, v_full, k_empty,
                  v_empty, D_QK, D_V, STAGES)  # fmt: skip
        step += compressed.total
        _load_run(step, sliding, sliding_k, sliding_v, kv_head, k_smem, v_smem, k_full, v_full, k_empty, v_empty,
                  D_QK, D_V, STAGES)  # fmt: skip
        step += sliding.total
        load_union(step, union[0], union[2], selected_k, selected_v, kv_head, k_smem, v_smem, k_full, v_full, k_empty,
                   v_empty, D_QK, D_V, BLOCK_SIZE, STAGES)  # fmt: skip
        step += union[2] * (BLOCK_SIZE // ROWS)


@gluon.jit
def _fold_gate(
    gates_ptr, grad_gates_ptr, o_ptr, do, lse_ptr, delta_ptr, shifted_ptr, rows, exists, D: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """delta = o · do, the gate's gradient, and lse - ln(gate) of a branch; a gate of 0 shifts so far that p is 0."""
    delta = gl.sum(load_tile(o_ptr, rows, D).to(gl.float32) * do, 1)
    gate = gl.load(gates_ptr + 3 * rows).to(gl.float32)
    shifted = gl.where(gate == 0, -HIDDEN, gl.load(lse_ptr + rows) - gl.log(gate))  # NaN where it is negative
    gl.store(delta_ptr + rows, delta, mask=exists)
    gl.store(shifted_ptr + rows, shifted, mask=exists)
    gl.store(grad_gates_ptr + 3 * rows, delta.to(grad_gates_ptr.dtype.element_ty), mask=exists)
    return gl.convert_layout(shifted * LOG2_E, LAYOUT), gl.convert_layout(delta, LAYOUT)


@gluon.jit
def _add_run(
    state, begin, stop, first_step, total, lse, delta, first, end, steps, shared, scale_log2,
    MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Steps [begin, stop) of a run add ds · k to dq."""
    products, dq = state
    s_layout: gl.constexpr = products.type.layout
    for i in range(begin, stop):
        dp, stage = _start_step(first_step + i, s_layout, shared, STAGES)
        p = gl.exp2(products * scale_log2 - lse[:, None])
        if MASKED:
            s = place_of(i, steps, ROWS)[1] + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
            p = gl.where((s[None, :] >= first[:, None]) & (s[None, :] < end[:, None]), p, 0.0)
        products, dq = _end_step(first_step + i, total, p, dp, delta, dq, stage, s_layout, shared, STAGES)
    return products, dq


@gluon.jit
def _add_union(
    state, union, first_step, total, lse, delta, token, first_token, query, shared, scale_log2,
    BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The blocks of a tile's union add ds · k to dq."""
    products, dq = state
    s_layout: gl.constexpr = products.type.layout
    start_ptr, mask_ptr, size = union
    runs = size * (BLOCK_SIZE // ROWS)
    start, chosen = union_step(start_ptr, mask_ptr, 0, gl.maximum(runs, 1), BLOCK_SIZE)
    for i in range(runs):
        dp, stage = _start_step(first_step + i, s_layout, shared, STAGES)
        next_start, next_chosen = union_step(start_ptr, mask_ptr, i + 1, runs, BLOCK_SIZE)
        p = gl.exp2(products * scale_log2 - gl.where((chosen >> query) & 1 != 0, lse, -LOWEST)[:, None])
        if start + ROWS > first_token + 1:  # only then has the block keys after one of the queries
            s = start + gl.arange(0, ROWS, gl.SliceLayout(0, s_layout))
            p = gl.where(s[None, :] <= token[:, None], p, 0.0)
        products, dq = _end_step(first_step + i, total, p, dp, delta, dq, stage, s_layout, shared, STAGES)
        start, chosen = next_start, next_chosen
    return products, dq


@gluon.jit
def _start_step(i, S_LAYOUT: gl.constexpr, shared, STAGES: gl.constexpr):
    """Start do · v of a step."""
    _, do_smem, _, v_smem, _, v_full, _, _ = shared
    stage = i % STAGES
    mbarrier.wait(v_full.index(stage), i // STAGES & 1)
    none = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    dp = warpgroup_mma(do_smem, v_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
    return dp, stage


@gluon.jit
def _end_step(i, total, p, dp, delta, dq, stage, S_LAYOUT: gl.constexpr, shared, STAGES: gl.constexpr):
    """Add ds · k to dq while q · k of the next step runs; returns that product and dq."""
    q_smem, _, k_smem, _, k_full, _, k_empty, v_empty = shared
    ds = p * (warpgroup_mma_wait(0, deps=[dp]) - delta[:, None])
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = gl.convert_layout(ds.to(q_smem.dtype), gl.DotOperandLayout(0, dq.type.layout, 2))
    dq = warpgroup_mma(ds, k_smem.index(stage), dq, is_async=True)
    following = gl.minimum(i + 1, total - 1)
    mbarrier.wait(k_full.index(following % STAGES), following // STAGES & 1)
    none = gl.zeros([ROWS, ROWS], gl.float32, S_LAYOUT)
    k = k_smem.index(following % STAGES).permute((1, 0))
    products = warpgroup_mma(q_smem, k, none, use_acc=False, is_async=True)
    dq = warpgroup_mma_wait(1, deps=[dq])
    mbarrier.arrive(k_empty.index(stage), count=1)
    return warpgroup_mma_wait(0, deps=[products]), dq


@gluon.jit
def _multiply(
    tensors, outputs, runs, unions, shared, num_tokens, num_tiles, scale,
    HALF: gl.constexpr, H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A multiplying group: dq of one tile after another, and on the way what the kernels of dk and dv need."""
    q_ptr, do_ptr, gates_ptr, o_ptrs, lse_ptrs = tensors
    grad_gates_ptr, delta_ptr, shifted_ptr, dq_ptr = outputs
    q_smem, do_smem, k_smem, k_full = shared[0], shared[1], shared[2], shared[4]
    H: gl.constexpr = H_KV * GROUP
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D_QK, 16])
    row: gl.constexpr = gl.SliceLayout(1, s_layout)
    branch = gl.to_tensor(num_tokens).to(gl.int64) * H
    scale_log2 = scale * LOG2_E
    step = 0
    for lap in range(_count_laps(num_tiles, H_KV)):
        tile, kv_head = _find_tile(lap, num_tiles, HALF)
        compressed, sliding, union = _find_walk(tile, kv_head, runs, unions, num_tokens, num_tiles, H_KV, GROUP)
        first_token = tile * (ROWS // GROUP)
        thread_barrier()  # no warp of the group multiplies the queries of the tile before any more
        _, rows, _ = tile_rows(first_token, num_tokens, kv_head, H, GROUP, gl.SliceLayout(1, rows_layout(D_QK)))
        q_smem.store(load_tile(q_ptr, rows, D_QK))
        _, rows, exists = tile_rows(first_token, num_tokens, kv_head, H, GROUP, gl.SliceLayout(1, rows_layout(D_V)))
        do = load_tile(do_ptr, rows, D_V)
        do_smem.store(do)
        fence_async_shared()
        do = do.to(gl.float32)
        compressed_lse, compressed_delta = _fold_gate(
            gates_ptr, grad_gates_ptr, o_ptrs[0], do, lse_ptrs[0], delta_ptr, shifted_ptr, rows, exists, D_V, row
        )
        selected_lse, selected_delta = _fold_gate(
            gates_ptr + 1, grad_gates_ptr + 1, o_ptrs[1], do, lse_ptrs[1], delta_ptr + branch, shifted_ptr + branch,
            rows, exists, D_V, row)  # fmt: skip
        sliding_lse, sliding_delta = _fold_gate(
            gates_ptr + 2, grad_gates_ptr + 2, o_ptrs[2], do, lse_ptrs[2], delta_ptr + 2 * branch,
            shifted_ptr + 2 * branch, rows, exists, D_V, row)  # fmt: skip
        token, _, _ = tile_rows(first_token, num_tokens, kv_head, H, GROUP, row)
        thread_barrier()
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), step // STAGES & 1)
        none = gl.zeros([ROWS, ROWS], gl.float32, s_layout)
        products = warpgroup_mma(q_smem, k_smem.index(stage).permute((1, 0)), none, use_acc=False, is_async=True)
        state = (warpgroup_mma_wait(0, deps=[products]), gl.zeros([ROWS, D_QK], gl.float32, dq_layout))
        total = step + compressed.total + sliding.total + union[2] * (BLOCK_SIZE // ROWS)
        first, end = gl.load(runs[0] + token), gl.load(runs[1] + token)
        state = _add_run(state, 0, compressed.num_edges, step, total, compressed_lse, compressed_delta, first, end,
                         compressed, shared, scale_log2, True, STAGES)  # fmt: skip
        state = _add_run(state, compressed.num_edges, compressed.total, step, total, compressed_lse, compressed_delta,
                         first, end, compressed, shared, scale_log2, False, STAGES)  # fmt: skip
        step += compressed.total
        first, end = gl.load(runs[2] + token), gl.load(runs[3] + token)
        state = _add_run(state, 0, sliding.num_edges, step, total, sliding_lse, sliding_delta, first, end, sliding,
                         shared, scale_log2, True, STAGES)  # fmt: skip
        state = _add_run(state, sliding.num_edges, sliding.total, step, total, sliding_lse, sliding_delta, first, end,
                         sliding, shared, scale_log2, False, STAGES)  # fmt: skip
        step += sliding.total
        query = gl.arange(0, ROWS, row) // GROUP
        _, dq = _add_union(state, union, step, total, selected_lse, selected_delta, token, first_token, query, shared,
                           scale_log2, BLOCK_SIZE, STAGES)  # fmt: skip
        step = total
        _, rows, exists = tile_rows(first_token, num_tokens, kv_head, H, GROUP, gl.SliceLayout(1, dq_layout))
        column = gl.arange(0, D_QK, gl.SliceLayout(0, dq_layout))
        dq = (dq * scale).to(dq_ptr.dtype.element_ty)
        gl.store(dq_ptr + rows[:, None] * D_QK + column[None, :], dq, mask=exists[:, None])


@gluon.jit
def _shared(DTYPE: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory and barriers of one tile."""
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_QK], DTYPE)
    v_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D_V], DTYPE)
    q_smem = gl.allocate_shared_memory(DTYPE, [ROWS, D_QK], k_layout)
    do_smem = gl.allocate_shared_memory(DTYPE, [ROWS, D_V], v_layout)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_QK], k_layout)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, ROWS, D_V], v_layout)
    k_full, v_full = barriers(STAGES, 1), barriers(STAGES, 1)
    k_empty, v_empty = barriers(STAGES, 1), barriers(STAGES, 1)
    return q_smem, do_smem, k_smem, v_smem, k_full, v_full, k_empty, v_empty


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
    H_KV: gl.constexpr, GROUP: gl.constexpr, D_QK: gl.constexpr, D_V: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A program computes dq of pairs of neighbouring tiles of one KV head, a group one tile of each pair."""
    runs = (compressed_first_ptr, compressed_end_ptr, window_first_ptr, window_end_ptr)
    unions = (start_ptr, mask_ptr, size_ptr, U)
    shared_a = _shared(compressed_k.dtype, D_QK, D_V, STAGES)
    shared_b = _shared(compressed_k.dtype, D_QK, D_V, STAGES)
    fence_async_shared()
    keys = (compressed_k, compressed_v, sliding_k, sliding_v, selected_k, selected_v)
    o_ptrs = (compressed_o_ptr, selected_o_ptr, sliding_o_ptr)
    lse_ptrs = (compressed_lse_ptr, selected_lse_ptr, sliding_lse_ptr)
    tensors = (q_ptr, do_ptr, gates_ptr, o_ptrs, lse_ptrs)
    outputs = (grad_gates_ptr, delta_ptr, shifted_ptr, dq_ptr)
    gl.warp_specialize(
        [
            (_multiply, (tensors, outputs, runs, unions, shared_a, num_tokens, num_tiles, scale,
                         0, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
            (_multiply, (tensors, outputs, runs, unions, shared_b, num_tokens, num_tiles, scale,
                         1, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
            (_load, (keys, runs, unions, shared_a, num_tokens, num_tiles,
                     0, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
            (_load, (keys, runs, unions, shared_b, num_tokens, num_tiles,
                     1, H_KV, GROUP, D_QK, D_V, BLOCK_SIZE, STAGES)),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip


def launch_query_gradient_on_hopper(
    forward: Attended, do: Tensor, where: BatchLayout, block_size: int, scale: float, out: QueryGradient
) -> None:
    """`dispatch.query_gradient` in Gluon."""
    q, gates, pairs, block_indices, o, lse = forward
    (T, H, D_QK), (_, H_KV, D_V) = q.shape, pairs[1].shape
    unions = unite(block_indices, where.document_start, block_size, ROWS.value * H_KV // H)
    num_tiles = unions.size.shape[0]
    _dq_kernel[(resident_programs(ceil_div(num_tiles, 2) * H_KV, q.device),)](
        q, do, gates, out.gates, *(tiles(x, ROWS.value) for x in pairs), *o, *lse,
        *where.compressed_runs[:2], *where.sliding_runs[:2], *unions, out.delta, out.lse, out.dq,
        T, num_tiles, unions.start.shape[-1], scale,
        H_KV, H // H_KV, D_QK, D_V, block_size, _STAGES, num_warps=4,
    )  # fmt: skip


_STAGES = 2
