"""Validation metrics of a language model, exact over batches and ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_lightning.model.positions import POSITION_BUCKETS, position_buckets
from nsa_lightning.training.compat import CastMetric


class _ExactSums(CastMetric):
    """Sums over batches and ranks in float64."""

    full_state_update = False

    def __init__(self, **sizes: Sequence[int]) -> None:
        super().__init__()
        self._sums = tuple(sizes)
        for name, size in sizes.items():
            self.add_state(name, default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def on_cast(self) -> None:
        """Follow the model to its device but keep float64: a sum in a lower precision stops growing."""
        self._widen()

    def reset(self) -> None:
        """Start the sums again."""
        super().reset()
        self._widen()

    def _widen(self) -> None:
        for name in self._sums:
            setattr(self, name, getattr(self, name).double())


class LanguageModelingMetrics(_ExactSums):
    """Loss (nats a token), perplexity and bits per byte from sums over all scored tokens."""

    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__(nats=(), tokens=(), bytes=())

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


class LossByPosition(_ExactSums):
    """Loss (nats a token) by the position in its document from which a token is predicted, in buckets that double.

    The token at position p predicts the one at p + 1, and counts at p.
    """

    nats: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        size = (len(POSITION_BUCKETS),)
        super().__init__(nats=size, tokens=size)

    def update(self, losses: Tensor, positions: Tensor, scored: Tensor) -> None:
        """Add the losses [T] of what the tokens at positions [T] of their documents predict, where `scored` [T]."""
        bucket = position_buckets(positions)
        self.nats.index_add_(0, bucket, losses.double().where(scored, 0.0))
        self.tokens.index_add_(0, bucket, scored.double())

    def compute(self) -> dict[str, Tensor]:
        """Mean loss of every bucket that has tokens, by its first position."""
        means = (self.nats / self.tokens).float()
        return {str(start): means[i] for i, start in enumerate(POSITION_BUCKETS) if self.tokens[i] > 0}
