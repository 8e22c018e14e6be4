"""What kernels take together, as one argument with names.

Constants of a launch travel in a NamedTuple for nothing. Pointers stay single arguments of a launch, and a kernel
groups them at once: each tuple of pointers would cost the host about 1 us, a tenth of a launch.
"""

from typing import NamedTuple

from torch import Tensor

from nsa_kernels.triton.primitives import padded


class Heads(NamedTuple):
    """Heads of queries and keys, constants of a kernel."""

    H_KV: int
    GROUP: int  # query heads of a KV head
    D_QK: int
    D_V: int
    BLOCK_QK: int  # columns of a tile that hold D_QK
    BLOCK_V: int

    @property
    def H(self) -> int:  # noqa: N802
        """Query heads."""
        return self.H_KV * self.GROUP


def heads_of(q: Tensor, v: Tensor) -> Heads:
    """The heads of queries [..., H, D_qk] and values [..., H_kv, D_v]."""
    (H, D_QK), (H_KV, D_V) = q.shape[-2:], v.shape[-2:]
    return Heads(H_KV, H // H_KV, D_QK, D_V, padded(D_QK), padded(D_V))
