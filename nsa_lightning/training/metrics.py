"""Validation metrics of a language model, exact over batches and ranks."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Module
from torchmetrics import Metric

_SUMS = ("nats", "tokens", "bytes")


class LanguageModelingMetrics(Metric):
    """Loss (nats a token), perplexity and bits per byte from sums over all scored tokens."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in _SUMS:
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Module:
        """Follow the model to its device but keep float64: a sum in a lower precision stops growing."""
        module = super()._apply(fn, exclude_state)
        self._widen()
        return module

    def reset(self) -> None:
        """Start the sums again."""
        super().reset()
        self._widen()

    def _widen(self) -> None:
        for name in _SUMS:
            setattr(self, name, getattr(self, name).double())

    def update(self, nats: Tensor, tokens: Tensor, bytes: Tensor) -> None:
        """Add the summed loss of a batch, the number of scored tokens and the bytes they stand for."""
        self.nats += nats.double()
        self.tokens += tokens
        self.bytes += bytes

    def compute(self) -> dict[str, Tensor]:
        """`loss`, `perplexity` and `bits_per_byte`; NaN before the first scored token."""
        loss = self.nats / self.tokens
        return {
            "loss": loss.float(),
            "perplexity": loss.exp().float(),
            "bits_per_byte": (self.nats / math.log(2) / self.bytes).float(),
        }
