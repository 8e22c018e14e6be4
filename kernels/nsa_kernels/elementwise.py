"""What a layer computes number by number: one kernel each where no gradient is wanted, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from nsa_kernels.attention import HAS_TRITON
from nsa_kernels.rotary import apply_rotary

# T tokens, N numbers of a token, H heads, D head dim, R rotated dimensions of a head, I hidden units.


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary`: x [T, H, D], cosines and sines [T, R/2] -> [T, H, D]."""
    if not _by_kernel(x):
        return apply_rotary(x, cos, sin)
    from nsa_kernels.triton import elementwise as elementwise_triton

    return elementwise_triton.rotate(x, cos, sin)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, I] each; rounded once by the kernel."""
    if not _by_kernel(gate):
        return torch.nn.functional.silu(gate) * up
    from nsa_kernels.triton import elementwise as elementwise_triton

    return elementwise_triton.silu_product(gate, up)


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + change, [T, N] each, and its RMS norm (arXiv:1910.07467) times a weight [N]."""
    if not (_by_kernel(x) and x.ndim == 2 and x.dtype == change.dtype == weight.dtype):
        total = x + change
        return total, torch.nn.functional.rms_norm(total, weight.shape, weight, eps)
    from nsa_kernels.triton import elementwise as elementwise_triton

    return elementwise_triton.add_norm(x, change, weight, eps)


def _by_kernel(x: Tensor) -> bool:
    """Whether no gradient is wanted, no compiler fuses what follows, and the kernels run on x's device."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (x.is_cuda and HAS_TRITON):
        return False
    from nsa_kernels.triton import backend as triton_backend
    from nsa_kernels.triton import primitives

    return x.dtype in primitives.DTYPES and triton_backend.is_recent(x.device)
