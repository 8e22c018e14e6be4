"""Several linear maps of one input as one matrix: a step of decoding takes as long as its launches, not its numbers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointProjection:
    """x [T, hidden_size] -> the outputs of all maps, [T, out_features] each, views of one tensor.

    The maps' own weights and biases become views of the joint ones and are not trained any more: none is held twice.

    Args:
        maps: of one input size and dtype.
    """

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        self._sizes = [one.out_features for one in maps]
        self._weight = torch.cat([one.weight.detach() for one in maps])
        biases = [one.weight.new_zeros(one.out_features) if one.bias is None else one.bias.detach() for one in maps]
        joint_bias = torch.cat(biases)
        self._bias = None if all(one.bias is None for one in maps) else joint_bias
        for one, weight, bias in zip(maps, self._weight.split(self._sizes), joint_bias.split(self._sizes), strict=True):
            one.weight = nn.Parameter(weight, requires_grad=False)
            one.bias = one.bias if one.bias is None else nn.Parameter(bias, requires_grad=False)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of the maps."""
        return F.linear(x, self._weight, self._bias).split(self._sizes, dim=-1)
