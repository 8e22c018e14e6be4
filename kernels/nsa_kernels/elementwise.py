"""What a layer computes number by number: one kernel each where no gradient is wanted, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from nsa_kernels.backends import elementwise_implementation
from nsa_kernels.rotary import apply_rotary

# T tokens, N numbers of a token, H heads, D head dim, R rotated dimensions of a head, I hidden units.


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary`: x [T, H, D], cosines and sines [T, R/2] -> [T, H, D]."""
    if elementwise_implementation(x) == "eager":
        return apply_rotary(x, cos, sin)
    from nsa_kernels.triton.elementwise import launch_rotate

    return launch_rotate(x, cos, sin)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [T, I] each; rounded once by the kernel."""
    if elementwise_implementation(gate) == "eager":
        return torch.nn.functional.silu(gate) * up
    from nsa_kernels.triton.elementwise import launch_silu_product

    return launch_silu_product(gate, up)


def add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + change, [T, N] each, and its RMS norm (arXiv:1910.07467) times a weight [N]."""
    alike = x.ndim == 2 and x.dtype == change.dtype == weight.dtype
    if not alike or elementwise_implementation(x) == "eager":
        total = x + change
        return total, torch.nn.functional.rms_norm(total, weight.shape, weight, eps)
    from nsa_kernels.triton.elementwise import launch_add_norm

    return launch_add_norm(x, change, weight, eps)
