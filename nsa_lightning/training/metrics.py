"""Validation metrics of a language model, exact over batches and ranks."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageModelingMetrics(Metric):
    """Loss (nats a token), perplexity and bits per byte from sums over all scored tokens."""

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

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
