"""Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama checkpoints."""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of every head: pairs (i, i + R/2) turn by the angle of their token.

    Args:
        x: [T, H, D].
        cos: cosines of the angles, [T, R/2] with R <= D; computed in their dtype, as is `sin`.
        sin: sines of the angles, [T, R/2].

    Returns:
        The rotated heads in x's dtype, [T, H, D]; dimensions past R are unchanged.
    """
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [T, 1, R/2]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)
