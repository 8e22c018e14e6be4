"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from nsa_kernels.elementwise import silu_product
from torch import Tensor, nn

from nsa_lightning.model.joint_projection import JointProjection


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), x [T, hidden_size]."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self._joint: JointProjection | None = None

    def join_projections(self) -> None:
        """Compute gate and up as one from now on; they are not trained any more."""
        self._joint = self._joint or JointProjection([self.gate_proj, self.up_proj])

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        gate, up = (self.gate_proj(x), self.up_proj(x)) if self._joint is None else self._joint(x)
        return self.down_proj(silu_product(gate, up))
