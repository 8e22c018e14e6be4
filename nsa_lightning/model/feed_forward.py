"""The gated feed-forward layer (SwiGLU, arXiv:2002.05202)."""

from nsa_kernels.elementwise import silu_product
from torch import Tensor, nn

from nsa_lightning.model.joint_projection import JointProjection, outputs


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
        if self._joint is None or not self._joint.holds(self._maps()):
            self._joint = JointProjection(self._maps())

    def _maps(self) -> list[nn.Linear]:
        return [self.gate_proj, self.up_proj]

    def forward(self, x: Tensor) -> Tensor:
        """[T, hidden_size] -> [T, hidden_size]."""
        gate, up = outputs(self._joint, self._maps(), x)
        return self.down_proj(silu_product(gate, up))
