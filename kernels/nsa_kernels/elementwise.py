"""What a layer computes number by number: one kernel each where no gradient is wanted, plain PyTorch elsewhere."""

from importlib.util import find_spec

import torch
from torch import Tensor

from nsa_kernels.rotary import apply_rotary

# T tokens, H heads, D head dim, R rotated dimensions of a head, I hidden units.

_HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary`: x [T, H, D], cosines and sines [T, R/2] -> [T, H, D]."""
    if not _by_kernel(x):
        return apply_rotary(x, cos, sin)
    from nsa_kernels import elementwise_triton

    return elementwise_triton.rotate(x, cos, sin)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, I] each; rounded once by the kernel."""
    if not _by_kernel(gate):
        return torch.nn.functional.silu(gate) * up
    from nsa_kernels import elementwise_triton

    return elementwise_triton.silu_product(gate, up)


def _by_kernel(x: Tensor) -> bool:
    """Whether no gradient is wanted, no compiler fuses what follows, and the kernels run on x's device."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not (x.is_cuda and x.dtype in _DTYPES and _HAS_TRITON):
        return False
    from nsa_kernels import triton_backend

    return triton_backend.is_recent(x.device)
