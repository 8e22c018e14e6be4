"""What a layer computes number by number: one kernel each where no gradient is wanted, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from nsa_kernels.native_sparse_attention import HAS_TRITON
from nsa_kernels.rotary import apply_rotary

# T tokens, H heads, D head dim, R rotated dimensions of a head, I hidden units.


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
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (x.is_cuda and HAS_TRITON):
        return False
    from nsa_kernels import primitives, triton_backend

    return x.dtype in primitives.DTYPES and triton_backend.is_recent(x.device)
