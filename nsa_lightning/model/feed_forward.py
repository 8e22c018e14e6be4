"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor, nn


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), x [T, hidden_size]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
