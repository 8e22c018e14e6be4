"""Parameter groups and learning-rate schedules."""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import nn

ADAMW_DEFAULTS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
"""Arguments of the AdamW that trains where no optimizer is configured."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups for the optimizer: matrices, which take its weight decay, and norms and biases, which do not."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [p for name, p in trained if name.endswith("weight") and p.ndim >= 2]
    others = [p for name, p in trained if not (name.endswith("weight") and p.ndim >= 2)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Schedule(ABC):
    """Learning rate over a run, as a multiple of the optimizer's.

    Args:
        warmup_steps: steps of linear warm-up, the first at 1 / warmup_steps.
        final_ratio: multiple of the learning rate that the run ends towards.
    """

    def __init__(self, warmup_steps: int = 100, final_ratio: float = 0.1) -> None:
        if warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must be at least 0, got {warmup_steps}")
        if not 0 <= final_ratio <= 1:
            raise ValueError(f"schedule.final_ratio must be from 0 to 1, got {final_ratio}")
        self.warmup_steps, self.final_ratio = warmup_steps, final_ratio

    def factor(self, step: int, total_steps: int) -> float:
        """Multiple of the learning rate for the optimizer step `step`, counted from 0, of `total_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.after_warmup(step, total_steps)

    @abstractmethod
    def after_warmup(self, step: int, total_steps: int) -> float:
        """`factor` for the steps after warm-up."""

    def _fall(self, progress: float, shape: Literal["linear", "cosine"]) -> float:
        """From 1 at progress 0 to final_ratio at progress 1 and after."""
        progress = min(max(progress, 0.0), 1.0)
        left = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_ratio + (1 - self.final_ratio) * left


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to the final ratio.

    Args:
        warmup_steps: steps of linear warm-up, the first at 1 / warmup_steps.
        final_ratio: multiple of the learning rate that the run ends towards.
    """

    def after_warmup(self, step: int, total_steps: int) -> float:
        """Half a cosine over the steps that are left."""
        return self._fall((step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1), "cosine")


class WarmupStableDecay(Schedule):
    """Linear warm-up, then constant, then linear decay over the last part of the run (WSD, arXiv:2404.06395).

    Args:
        warmup_steps: steps of linear warm-up, the first at 1 / warmup_steps.
        decay_ratio: share of the run's steps over which the learning rate decays.
        final_ratio: multiple of the learning rate that the run ends towards.
    """

    def __init__(self, warmup_steps: int = 100, decay_ratio: float = 0.2, final_ratio: float = 0.0) -> None:
        super().__init__(warmup_steps, final_ratio)
        if not 0 < decay_ratio <= 1:
            raise ValueError(f"schedule.decay_ratio must be above 0 and at most 1, got {decay_ratio}")
        self.decay_ratio = decay_ratio

    def after_warmup(self, step: int, total_steps: int) -> float:
        """1 until the decay begins."""
        decay_steps = max(self.decay_ratio * total_steps, 1.0)
        return self._fall((step - (total_steps - decay_steps)) / decay_steps, "linear")
