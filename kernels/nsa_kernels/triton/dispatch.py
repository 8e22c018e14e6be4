"""Where the name that a plan gives a stage becomes a launch: attention by runs and by blocks, and its gradients."""

from torch import Tensor

from nsa_kernels.packing import BatchLayout, KeyRuns
from nsa_kernels.triton.block_attention import (
    launch_block_attention,
    launch_block_gradients,
    room_for_gradients,
    sum_block_parts,
    without_empty_slots,
)
from nsa_kernels.triton.query_gradient import Attended, QueryGradient, launch_query_gradient
from nsa_kernels.triton.run_attention import (
    OtherBranches,
    launch_run_attention,
    launch_run_gradients,
    sum_run_parts,
)

# T packed tokens, S keys, H query heads, H_kv KV heads, D_qk and D_v head dims, n chosen blocks, l' tokens in one.


def run_attention(
    implementation: str, stage: str, q: Tensor, k: Tensor, v: Tensor, runs: KeyRuns, scale: float,
    others: OtherBranches | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [T, H, D_v] in q's dtype and lse float32 [T, H] of queries that see the keys of `runs`.

    `stage` is `compressed` or `sliding`, which differ in what is tuned. With `others` their gated sum is written too.
    """
    if implementation == "hopper":
        from nsa_kernels.hopper.run_attention import launch_run_attention_on_hopper

        return launch_run_attention_on_hopper(q, k, v, runs, scale, others)
    return launch_run_attention(q, k, v, runs, scale, stage, others)


def run_gradients(
    implementation: str, stage: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor,
    runs: KeyRuns, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk [S, H_kv, D_qk] and dv [S, H_kv, D_v]; the queries are divided where few keys keep few programs busy."""
    inputs, split = (q, k, v, do, lse, delta, runs, scale), stage == "compressed"
    if implementation == "hopper":
        from nsa_kernels.hopper.run_gradients import launch_run_gradients_on_hopper

        parts = launch_run_gradients_on_hopper(*inputs, split)
    else:
        parts = launch_run_gradients(*inputs, stage, split)
    return sum_run_parts(parts, k, v, runs, len(q))


def block_attention(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, document_start: Tensor,
    block_size: int, scale: float, past: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [T, H, D_v] in q's dtype and lse float32 [T, H] of queries that see the blocks of `block_indices`.

    The keys may begin `past` tokens before the queries; `document_start` counts them.
    """
    block_indices = without_empty_slots(block_indices, k, block_size)
    inputs = (q, k, v, block_indices, document_start, block_size, scale, past)
    if implementation == "hopper":
        from nsa_kernels.hopper.block_attention import launch_block_attention_on_hopper

        return launch_block_attention_on_hopper(*inputs)
    return launch_block_attention(*inputs)


def block_gradients(
    implementation: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor, lse: Tensor, delta: Tensor,
    block_indices: Tensor, where: BatchLayout, block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk [T, H_kv, D_qk] and dv [T, H_kv, D_v]."""
    num_blocks, bounds = len(where.block_start), (where.block_start, where.block_end)
    out = room_for_gradients(q, k, v, block_indices, where.first_block, num_blocks, block_size)
    inputs = (q, k, v, do, lse, delta, out, *bounds, block_size, scale)
    if implementation == "hopper":
        from nsa_kernels.hopper.block_gradients import launch_block_gradients_on_hopper

        launch_block_gradients_on_hopper(*inputs)
    else:
        launch_block_gradients(*inputs)
    return sum_block_parts(out, *bounds, block_size)


def query_gradient(
    implementation: str, forward: Attended, do: Tensor, where: BatchLayout, block_size: int, scale: float
) -> QueryGradient:
    """The gradient of q through all branches, that of the gates, and what the other gradients are computed from."""
    out = QueryGradient.of(forward.q, forward.gates)
    if implementation == "hopper":
        from nsa_kernels.hopper.query_gradient import launch_query_gradient_on_hopper

        launch_query_gradient_on_hopper(forward, do, where, block_size, scale, out)
    else:
        launch_query_gradient(forward, do, where, block_size, scale, out)
    return out
