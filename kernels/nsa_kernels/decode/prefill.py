"""The next chunk of one sequence on the training kernels: its queries, and the keys of everything before them."""

import torch
from torch import Tensor

from nsa_kernels.backends import Stages, check_kernel_inputs
from nsa_kernels.geometry import NSAConfig, NSAOutput
from nsa_kernels.packing import BatchLayout, KeyRuns
from nsa_kernels.triton.block_selection import block_selection
from nsa_kernels.triton.dispatch import block_attention, run_attention
from nsa_kernels.triton.run_attention import OtherBranches

# T tokens of the chunk, L tokens so far, M of them for the window.


def attend_chunk(
    q: Tensor,
    gates: Tensor,
    selected: tuple[Tensor, Tensor],
    sliding: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor],
    config: NSAConfig,
    scale: float,
    stages: Stages,
) -> NSAOutput:
    """`chunk_attention` of contiguous tensors."""
    for keys, values in (selected, sliding, summaries):
        check_kernel_inputs(q, keys, values, scale)
    T, L, M = len(q), len(selected[0]), len(sliding[0])
    token = torch.arange(T, device=q.device, dtype=torch.int32)
    seen = (token + (L - T + 1 - config.compress_block_size)).div(config.compress_stride, rounding_mode="floor")
    none = torch.zeros_like(token)
    compressed = KeyRuns(none, (seen + 1).clamp(min=0), none, none)
    window_size = min(config.window_size, M)
    window = KeyRuns((token + (M - T + 1 - window_size)).clamp(min=0), token + (M - T + 1), none, none)
    if not len(summaries[0]):  # a descriptor wants a row, though nobody sees it
        summaries = (
            summaries[0].new_zeros(1, *summaries[0].shape[1:]),
            summaries[1].new_zeros(1, *summaries[1].shape[1:]),
        )
    compressed_o, lse = run_attention(stages.compressed_attention, "compressed", q, *summaries, compressed, scale)
    layout = BatchLayout(*[none] * len(BatchLayout._fields))._replace(document_start=none - (L - T))
    layout = layout._replace(first_summary=compressed.first, end_summary=compressed.end)
    blocks = block_selection(q, summaries[0], lse, config, scale, layout, past=L - T)
    selected_o, _ = block_attention(
        stages.selected_attention, q, *selected, blocks, none, config.select_block_size, scale, past=L - T
    )
    others = OtherBranches(gates, compressed_o, selected_o, torch.empty_like(selected_o))
    run_attention(stages.sliding_attention, "sliding", q, *sliding, window, scale, others)
    return NSAOutput(others.out, blocks)
