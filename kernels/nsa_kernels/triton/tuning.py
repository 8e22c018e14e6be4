"""Launch choices: how large a tile each kernel takes on each class of chip.

One table, filled from measurements (see `benchmarks.md`); nothing is tried out while a model runs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.triton.arguments import Tile
from nsa_kernels.triton.primitives import interpreted, padded


class TunedTile(NamedTuple):
    """What is tuned."""

    rows: int
    """Rows of a tile: query tokens times the heads of a group."""
    keys: int
    num_warps: int
    num_stages: int


class FittedTile(NamedTuple):
    """A tile fitted to a group size."""

    queries: int
    """Query tokens in a tile."""
    rows: int
    """Power of two that holds queries * G rows."""
    keys: int
    num_warps: int
    num_stages: int

    @property
    def sizes(self) -> Tile:
        """What a kernel takes of it."""
        return Tile(self.queries, self.rows, self.keys)

    @property
    def options(self) -> dict[str, int]:
        """What a launch takes by name."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


_HOPPER = {
    "compressed_forward": TunedTile(128, 128, 8, 3),
    "compressed_dkv": TunedTile(64, 64, 4, 2),
    "importance": TunedTile(64, 128, 4, 3),
    "selected_forward": TunedTile(64, 64, 4, 3),
    "selected_dkv": TunedTile(64, 64, 4, 3),
    "sliding_forward": TunedTile(64, 32, 4, 3),
    "sliding_dkv": TunedTile(64, 128, 8, 3),
    "joint_dq": TunedTile(64, 64, 4, 2),
}
_HOPPER_SMALL_GROUPS = _HOPPER | {
    "importance": TunedTile(64, 64, 4, 3),
    "selected_dkv": TunedTile(64, 64, 4, 2),
    "sliding_dkv": TunedTile(64, 64, 4, 2),
}
"""Up to 4 query heads a group."""
_OTHERS = {
    "compressed_forward": TunedTile(64, 64, 4, 2),
    "compressed_dkv": TunedTile(32, 64, 4, 2),
    "importance": TunedTile(64, 64, 4, 2),
    "selected_forward": TunedTile(64, 64, 4, 2),
    "selected_dkv": TunedTile(32, 64, 4, 1),
    "sliding_forward": TunedTile(64, 64, 4, 2),
    "sliding_dkv": TunedTile(32, 64, 4, 2),
    "joint_dq": TunedTile(32, 64, 4, 1),
}
"""Ampere, Ada, wide heads on Hopper, and chips not known yet: fits 99 KiB of shared memory up to head dim 128."""
_SMALL = dict.fromkeys(_HOPPER, TunedTile(32, 32, 4, 1))
"""What fits everywhere: float32, and wide heads on chips with little shared memory."""
_SMALLEST = dict.fromkeys(_HOPPER, TunedTile(16, 16, 4, 1))
"""Wide heads in float32, whose products are unrolled into single operations: compiled in a minute, not in many."""
_INTERPRETED = dict.fromkeys(_HOPPER, TunedTile(16, 16, 4, 1)) | dict.fromkeys(
    ("selected_forward", "selected_dkv", "joint_dq"), TunedTile(16, 4, 4, 1)
)


def fitted_tile(kernel: str, q: Tensor, head_dim: int, group_size: int) -> FittedTile:
    """The tile of a kernel for queries q on their device.

    Args:
        kernel: name in the table.
        q: any tensor in the inputs' dtype and on their device.
        head_dim: the larger of D_qk and D_v.
        group_size: query heads per KV head.
    """
    tile = _table(q, head_dim, group_size)[kernel]
    queries = max(1, tile.rows // group_size)
    rows = padded(queries * group_size)
    return FittedTile(queries, rows, tile.keys, tile.num_warps, tile.num_stages)


def _table(q: Tensor, head_dim: int, group_size: int) -> dict[str, TunedTile]:
    if interpreted():
        return _INTERPRETED
    if q.element_size() > 2:
        return _SMALL if head_dim <= 128 else _SMALLEST
    major, _ = torch.cuda.get_device_capability(q.device)
    if major == 9 and head_dim <= 128:
        return _HOPPER_SMALL_GROUPS if group_size <= 4 else _HOPPER
    return _OTHERS if head_dim <= 128 or major >= 9 else _SMALL
