"""Positions in a document, in buckets that double: what losses are told by."""

import torch
from torch import Tensor

POSITION_BUCKETS = [0, *(2**exponent for exponent in range(8, 25))]
"""First position of each bucket; it ends where the next begins."""


def position_buckets(positions: Tensor) -> Tensor:
    """The number of each position's bucket, int64, in the shape of `positions`."""
    starts = torch.tensor(POSITION_BUCKETS[1:], device=positions.device)
    return torch.bucketize(positions, starts, right=True)
