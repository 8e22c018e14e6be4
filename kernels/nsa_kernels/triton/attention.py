"""The stages in order, with one backward for all branches."""

import torch
from torch import Tensor

from nsa_kernels.backends import Stages, check_kernel_inputs
from nsa_kernels.geometry import Branches, NSAConfig, NSAOutput
from nsa_kernels.packing import BatchLayout
from nsa_kernels.rotary import apply_rotary
from nsa_kernels.triton.block_selection import block_selection
from nsa_kernels.triton.compress import compress
from nsa_kernels.triton.compressed_attention import compressed_attention
from nsa_kernels.triton.gated_sum import gated_sum

# T packed tokens, H query heads, H_kv KV heads, n selected blocks.


def attend_all_branches(
    q: Tensor,
    branches: Branches,
    gates: Tensor,
    config: NSAConfig,
    block_indices: Tensor | None,
    scale: float | None,
    layout: BatchLayout,
    stages: Stages,
) -> NSAOutput:
    """`native_sparse_attention` of checked inputs; the compressed branch is first, since the selection ranks by it."""
    for keys, values in (branches[:2], branches[2:4], branches[4:6]):
        factor = check_kernel_inputs(q, keys, values, scale)
    summary_k = compress(branches.compress_k, config, branches.k_weights, layout)
    summary_v = compress(branches.compress_v, config, branches.v_weights, layout)
    if branches.compressed_rotary is not None:
        summary_k = apply_rotary(summary_k, *branches.compressed_rotary)
    with torch.no_grad():
        compressed_o, lse = compressed_attention(q, summary_k, summary_v, factor, layout, stages)
        if block_indices is None:
            block_indices = block_selection(q, summary_k, lse, config, factor, layout)
    pairs = (*branches[:4], summary_k, summary_v)
    out = gated_sum(q, *pairs, gates, block_indices.int(), compressed_o, lse, config, factor, layout, stages)
    return NSAOutput(out, block_indices)
