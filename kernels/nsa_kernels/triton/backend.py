"""Native Sparse Attention on Triton kernels: the stages of `reference.py` for a GPU, and what they take."""

import torch
from torch import Tensor

from nsa_kernels.errors import SettingError
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.triton.block_selection import block_selection
from nsa_kernels.triton.compress import compress
from nsa_kernels.triton.compressed_attention import compressed_attention
from nsa_kernels.triton.gated_sum import gated_sum
from nsa_kernels.triton.primitives import check_inputs, interpreted
from nsa_kernels.triton.selected_attention import selected_attention
from nsa_kernels.triton.sliding_attention import sliding_attention

__all__ = [
    "block_selection",
    "compress",
    "compressed_attention",
    "gated_sum",
    "is_recent",
    "reason_against",
    "selected_attention",
    "sliding_attention",
]


def reason_against(q: Tensor, v: Tensor, config: NSAConfig) -> str | None:
    """Why the kernels do not take queries, values and block sizes like these; None if they do."""
    size, smallest = config.select_block_size, 1 if interpreted() else _SMALLEST_BLOCK
    if size < smallest or size & (size - 1):
        return f"select_block_size must be a power of two from {smallest} on, got {size}"
    if interpreted():
        return "Triton's interpreter computes bfloat16 wrongly" if q.dtype == torch.bfloat16 else _reason_of(q, v)
    if not q.is_cuda:
        return f"they are on {q.device.type}, the kernels run on CUDA devices"
    if not is_recent(q.device):
        return "the kernels need an Ampere GPU (compute capability 8.0) or a newer one"
    return _reason_of(q, v)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_recent(device: torch.device) -> bool:
    """Whether the GPU is one that the kernels run on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _reason_of(q: Tensor, v: Tensor) -> str | None:
    try:
        check_inputs(q, q[:, :1], v[:, :1], None)
    except SettingError as error:
        return str(error)
    return None


_SMALLEST_BLOCK = 16
"""Keys that a matrix instruction takes at least."""
