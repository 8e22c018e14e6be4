"""One packed batch shared by several ranks: a part of its tokens each, and in attention a part of the heads.

    all heads of a part of the tokens [T / P, H, D]  <- all-to-all ->  all tokens of a part of the heads [T, H / P, D]

Attention needs no other change: a head reads the whole batch and no other head (arXiv:2309.14509).
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor

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
            raise ValueError(
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
        return cast("tuple[Tensor, ...]", _AllToAll.apply(self.group, *parts))


class _AllToAll(torch.autograd.Function):
    """Part s of each of rank r's tensors becomes part r of rank s's, and its gradient goes back the same way."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        sent = [all_to_all_single(x.contiguous(), None, None, group) for x in tensors]
        return tuple(wait_tensor(x) for x in sent)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_AllToAll.apply(ctx.group, *gradients)
