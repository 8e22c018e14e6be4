"""The stages in order, each with a backward of its own, and the sum of the branches through their gates."""

import torch
from torch import Tensor

from nsa_kernels.eager.block_selection import block_selection
from nsa_kernels.eager.compress import compress
from nsa_kernels.eager.compressed_attention import compressed_attention
from nsa_kernels.eager.selected_attention import selected_attention
from nsa_kernels.eager.sliding_attention import sliding_attention
from nsa_kernels.geometry import Branches, NSAConfig, NSAOutput
from nsa_kernels.rotary import apply_rotary

# T packed tokens, H query heads, H_kv KV heads, n selected blocks.


@torch.compiler.disable  # type: ignore[untyped-decorator]  # chunks and documents are plain Python loops
def attend_branch_by_branch(
    q: Tensor,
    branches: Branches,
    gates: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    block_indices: Tensor | None,
    scale: float | None,
) -> NSAOutput:
    """`native_sparse_attention` of checked inputs."""
    summary_k = compress(branches.compress_k, cu_seqlens, config, branches.k_weights)
    summary_v = compress(branches.compress_v, cu_seqlens, config, branches.v_weights)
    if branches.compressed_rotary is not None:
        summary_k = apply_rotary(summary_k, *branches.compressed_rotary)
    compressed_o, lse = compressed_attention(q, summary_k, summary_v, cu_seqlens, config, scale)
    if block_indices is None:
        block_indices = block_selection(q, summary_k, lse, cu_seqlens, config, scale)
    selected_o, _ = selected_attention(q, branches.k, branches.v, block_indices, cu_seqlens, config, scale)
    sliding_o, _ = sliding_attention(q, branches.sliding_k, branches.sliding_v, cu_seqlens, config.window_size, scale)
    compressed_gate, selected_gate, sliding_gate = gates.to(q.dtype).unsqueeze(-1).unbind(2)  # 3 × [T, H, 1]
    out = compressed_gate * compressed_o + selected_gate * selected_o + sliding_gate * sliding_o
    return NSAOutput(out, block_indices)
