"""The stages of the operator one by one, as a plan runs them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from nsa_kernels import NSAConfig, Plan, eager, reference
from nsa_kernels.backends import Stages
from nsa_kernels.packing import BatchLayout
from torch import Tensor

from nsa_lightning.benchmark.inputs import Inputs

JOINT = "joint backward"
"""The backward of all branches at once, which kernels have in place of one for each."""

GRADIENTS = ("query_gradient", "compressed_gradient", "selected_gradient", "sliding_gradient")
"""The stages of a plan that make it up."""

# T packed tokens, H query heads, H_kv KV heads, D_qk and D_v head dims, C compressed blocks, n selected blocks.


class StageFunctions(NamedTuple):
    """Each stage as a function of tensors alone; attention returns o and the log-sum-exp."""

    compress: Callable[[Tensor], Tensor]
    compressed_attention: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, ck, cv
    block_selection: Callable[[Tensor, Tensor, Tensor], Tensor]  # q, ck, lse
    selected_attention: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, v, blocks
    sliding_attention: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # q, k, v


def plain_stages(backend: str, cu_seqlens: Tensor, config: NSAConfig) -> StageFunctions:
    """The stages of `eager` or `reference`, each with a backward of its own."""
    room: Any = reference if backend == "reference" else eager
    return StageFunctions(
        lambda x: room.compress(x, cu_seqlens, config),
        lambda q, ck, cv: room.compressed_attention(q, ck, cv, cu_seqlens, config),
        lambda q, ck, lse: room.block_selection(q, ck, lse, cu_seqlens, config),
        lambda q, k, v, blocks: room.selected_attention(q, k, v, blocks, cu_seqlens, config),
        lambda q, k, v: room.sliding_attention(q, k, v, cu_seqlens, config.window_size),
    )


def stage_functions(chosen: Plan, cu_seqlens: Tensor, config: NSAConfig, layout: BatchLayout) -> StageFunctions:
    """The stages of a plan; on kernels attention is forward alone, its backward is that of `branch_sum`."""
    if chosen.backend != "triton":
        return plain_stages(chosen.backend, cu_seqlens, config)
    from nsa_kernels.triton.block_selection import block_selection
    from nsa_kernels.triton.compress import compress
    from nsa_kernels.triton.compressed_attention import compressed_attention
    from nsa_kernels.triton.dispatch import block_attention, run_attention

    names, starts, runs = chosen.stages, layout.document_start, layout.sliding_runs

    def selected(q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        size = config.select_block_size
        return block_attention(names.selected_attention, q, k, v, blocks, starts, size, _scale(q))

    return StageFunctions(
        lambda x: compress(x, config, None, layout),
        lambda q, ck, cv: compressed_attention(q, ck, cv, _scale(q), layout, names),
        lambda q, ck, lse: block_selection(q, ck, lse, config, _scale(q), layout),
        torch.no_grad()(selected),
        torch.no_grad()(lambda q, k, v: run_attention(names.sliding_attention, "sliding", q, k, v, runs, _scale(q))),
    )


def branch_sum(
    stages: Stages, inputs: Inputs, ck: Tensor, cv: Tensor, blocks: Tensor, config: NSAConfig, layout: BatchLayout
) -> Callable[[], Tensor]:
    """Attention and the gated sum on kernels from summaries and chosen blocks on, whose backward is the joint one."""
    from nsa_kernels.triton.compressed_attention import compressed_attention
    from nsa_kernels.triton.gated_sum import gated_sum

    q, k, v, gates, _ = inputs
    compressed = compressed_attention(q, ck, cv, _scale(q), layout, stages)
    pairs = (k, v, k, v, ck, cv)
    return lambda: gated_sum(q, *pairs, gates, blocks, *compressed, config, _scale(q), layout, stages)


def _scale(q: Tensor) -> float:
    return q.shape[-1] ** -0.5
