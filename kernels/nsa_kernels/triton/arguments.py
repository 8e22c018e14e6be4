"""What kernels take together, as one argument with names.

Constants of a launch travel in a NamedTuple for nothing. Pointers stay single arguments of a launch, and a kernel
groups them at once: each tuple of pointers would cost the host about 1 us, a tenth of a launch.
"""

from typing import Any, NamedTuple

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


class Tile(NamedTuple):
    """What a program holds at a time, constants of a kernel."""

    QUERIES: int
    ROWS: int  # a power of two that holds QUERIES * GROUP
    KEYS: int


class Keys(NamedTuple):
    """Keys and values of a branch, or what copies tiles of them."""

    k: Any
    v: Any


class Runs(NamedTuple):
    """The run of keys that each token sees: pointers [T], or what was loaded from them."""

    first: Any
    end: Any


class Branches(NamedTuple):
    """Something of each branch."""

    compressed: Any
    selected: Any
    sliding: Any


def heads_of(q: Tensor, v: Tensor) -> Heads:
    """The heads of queries [..., H, D_qk] and values [..., H_kv, D_v]."""
    (H, D_QK), (H_KV, D_V) = q.shape[-2:], v.shape[-2:]
    return Heads(H_KV, H // H_KV, D_QK, D_V, padded(D_QK), padded(D_V))
