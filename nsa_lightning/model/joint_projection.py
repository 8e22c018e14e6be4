"""Several linear maps of one input as one matrix: a step of decoding takes as long as its launches, not its numbers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JointProjection:
    """x [T, hidden_size] -> the outputs of all maps, [T, out_features] each, views of one tensor.

    The maps' own weights and biases become views of the joint ones and are not trained any more: none is held twice.
    What is written to them in place is seen here. Where they are replaced, `holds` says so. A copy or a pickle of a
    model has maps of its own, so that there is None in the place of this object.

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
        self._maps, self._places = list(maps), [_places(one) for one in maps]

    def holds(self, maps: Sequence[nn.Linear]) -> bool:
        """Whether these are the maps, and their weights and biases still the views that they became."""
        return len(maps) == len(self._maps) and all(
            one is known and _places(one) == places
            for one, known, places in zip(maps, self._maps, self._places, strict=True)
        )

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs in the order of the maps."""
        return F.linear(x, self._weight, self._bias).split(self._sizes, dim=-1)

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def outputs(joint: JointProjection | None, maps: Sequence[nn.Linear], x: Tensor) -> Sequence[Tensor]:
    """The output of each map: of the joint one where it holds them and no gradient is wanted, which stops there."""
    if joint is None or torch.is_grad_enabled() or not joint.holds(maps):
        return [one(x) for one in maps]
    return joint(x)


def _places(one: nn.Linear) -> tuple[int, torch.dtype, int | None]:
    """Where the numbers of a map are; an address is enough, for the joint tensor keeps its memory."""
    return one.weight.data_ptr(), one.weight.dtype, None if one.bias is None else one.bias.data_ptr()
