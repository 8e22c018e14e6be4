"""The stages on kernels alone, with the signatures of the reference; but for `compress` they have no gradient."""

import nsa_kernels.triton.block_selection
import nsa_kernels.triton.compress
import nsa_kernels.triton.compressed_attention
import torch
from nsa_kernels import CompressionWeights, NSAConfig, plan
from nsa_kernels.packing import batch_layout
from nsa_kernels.triton.dispatch import block_attention, run_attention
from torch import Tensor


def compress(x: Tensor, cu_seqlens: Tensor, config: NSAConfig, weights: CompressionWeights | None = None) -> Tensor:
    return nsa_kernels.triton.compress.compress(x, config, weights, batch_layout(cu_seqlens, len(x), config))


def compressed_attention(
    q: Tensor, compressed_k: Tensor, compressed_v: Tensor, cu_seqlens: Tensor, config: NSAConfig
) -> tuple[Tensor, Tensor]:
    layout, stages = batch_layout(cu_seqlens, len(q), config), plan(q, compressed_v, config, "triton").stages
    stage = nsa_kernels.triton.compressed_attention.compressed_attention
    return stage(q, compressed_k, compressed_v, q.shape[-1] ** -0.5, layout, stages)


def block_selection(q: Tensor, compressed_k: Tensor, lse: Tensor, cu_seqlens: Tensor, config: NSAConfig) -> Tensor:
    layout = batch_layout(cu_seqlens, len(q), config)
    return nsa_kernels.triton.block_selection.block_selection(q, compressed_k, lse, config, q.shape[-1] ** -0.5, layout)


@torch.no_grad()
def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor, config: NSAConfig
) -> tuple[Tensor, Tensor]:
    start, stages = batch_layout(cu_seqlens, len(q), config).document_start, plan(q, v, config, "triton").stages
    sizes = (config.select_block_size, q.shape[-1] ** -0.5)
    return block_attention(stages.selected_attention, q, k, v, block_indices, start, *sizes)


@torch.no_grad()
def sliding_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, config: NSAConfig) -> tuple[Tensor, Tensor]:
    runs, stages = batch_layout(cu_seqlens, len(q), config).sliding_runs, plan(q, v, config, "triton").stages
    return run_attention(stages.sliding_attention, "sliding", q, k, v, runs, q.shape[-1] ** -0.5)
