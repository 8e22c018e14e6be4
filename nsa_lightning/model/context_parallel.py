"""One packed batch shared by several ranks: a part of its tokens each, and in attention a part of the heads.

    all heads of a part of the tokens [T / P, H, D]  <- all-to-all ->  all tokens of a part of the heads [T, H / P, D]

Attention needs no other change: a head reads the whole batch and no other head (arXiv:2309.14509).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from nsa_lightning.model.compat import all_to_all

# T packed tokens, P ranks that share them, H heads of queries or keys, a multiple of P, D numbers a head.


class ContextParallel(NamedTuple):
    """The ranks that share each batch, in the order of their tokens; by default this one alone.

    Parameters sliced by head get the gradient of this rank's heads, the others that of its tokens: the gradient of the
    whole batch is the sum over the ranks, as it is for ranks with batches of their own.
    """

    group: ProcessGroup | None = None
    rank: int = 0  # within the group
    size: int = 1

    def share(self, x: Tensor) -> Tensor:
        """This rank's part of the first dimension: of the tokens of a batch, or the KV heads of a parameter.

        Raises:
            ValueError: the parts would differ in size.
        """
        if self.size == 1:
            return x
        if len(x) % self.size:
            raise SettingError(
                "the tokens of a batch and the KV heads must be multiples of context_parallel_size, "
                f"got {len(x)} and {self.size}"
            )
        return x.chunk(self.size)[self.rank]

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """All heads of this rank's tokens, [T / P, H, D] each, to all tokens of its heads, [T, H / P, D]."""
        if self.size == 1:
            return tensors
        parts = [x.unflatten(1, (self.size, -1)).transpose(0, 1) for x in tensors]  # [P, T / P, H / P, D]
        return tuple(x.flatten(0, 1) for x in self._exchange(*parts))

    def to_tokens(self, x: Tensor) -> Tensor:
        """All tokens of this rank's heads, [T, H / P, D], to all heads of its tokens, [T / P, H, D]."""
        if self.size == 1:
            return x
        (parts,) = self._exchange(x.unflatten(0, (self.size, -1)))  # [P, T / P, H / P, D]
        return parts.transpose(0, 1).flatten(1, 2)

    @torch.no_grad()
    def whole(self, x: Tensor) -> Tensor:
        """The parts of all ranks, [T / P, …] each, as one, [T, …]."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        distributed.all_gather(parts, x, group=self.group)
        return torch.cat(parts)

    def _exchange(self, *parts: Tensor) -> tuple[Tensor, ...]:
        name = self.group.group_name if self.group is not None else ""  # a simulation names none
        return tuple(_all_to_all([x.contiguous() for x in parts], name))


@torch.library.custom_op("nsa_lightning::all_to_all", mutates_args=())
def _all_to_all(tensors: Sequence[Tensor], group_name: str) -> list[Tensor]:
    """Part s of each of rank r's tensors becomes part r of rank s's, and its gradient goes back the same way.

    One operator, so that activation checkpointing knows it and computes it again like any other.
    """
    return all_to_all(tensors, group_name)


@_all_to_all.register_fake
def _(tensors: Sequence[Tensor], group_name: str) -> list[Tensor]:
    return [torch.empty_like(x) for x in tensors]


def _save_group(ctx: Any, inputs: tuple[Sequence[Tensor], str], output: list[Tensor]) -> None:
    ctx.group_name = inputs[1]


def _send_back(ctx: Any, gradients: list[Tensor]) -> tuple[list[Tensor], None]:
    return _all_to_all([x.contiguous() for x in gradients], ctx.group_name), None


_all_to_all.register_autograd(_send_back, setup_context=_save_group)
