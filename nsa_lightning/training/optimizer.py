"""Parameter groups and learning-rate schedules."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments, check_types
from torch import nn
from torch.optim import Optimizer

from nsa_lightning.model.attention.registry import is_new_part

ADAMW_DEFAULTS: dict[str, Any] = {"lr": 3e-4, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": True}
"""Arguments of the AdamW that trains where no optimizer is configured."""


NEW = "new_parts_"
"""Begins the names of the parameter groups of what a dense model does not have."""


@dataclass(frozen=True, kw_only=True)
class NewParts:
    """How branch gates and block summaries train, which a dense model does not have.

    The branches' own keys and values are not among them: they start as copies of trained weights.

    Raises:
        ValueError: a negative number of steps, or a learning rate that is not positive and finite.
    """

    lr_factor: float = 1.0
    """Their learning rate as a multiple of the optimizer's."""

    freeze_others_steps: int = 0
    """Steps in which they alone are trained; the schedule of all others begins afterwards, warm-up included. A model
    without new parts trains from its first step."""

    def __post_init__(self) -> None:
        check_types(self, "new_parts.")
        if not 0 < self.lr_factor < float("inf"):
            raise SettingError(f"new_parts.lr_factor must be above 0 and finite, got {self.lr_factor}")
        if self.freeze_others_steps < 0:
            raise SettingError(f"new_parts.freeze_others_steps must be at least 0, got {self.freeze_others_steps}")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Named groups for the optimizer: matrices take its weight decay, norms and biases do not; new parts by themselves.

    At most `decayed`, `undecayed`, `new_parts_decayed` and `new_parts_undecayed`; empty ones are left out.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "name": f"{prefix}{name}"} | settings
        for prefix in ("", NEW)
        for name, settings in (("decayed", {}), ("undecayed", {"weight_decay": 0.0}))
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            undecayed = not (name.endswith("weight") and parameter.ndim >= 2)
            groups[2 * is_new_part(name) + undecayed]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def check_optimizer(create: Callable[[Any], Optimizer]) -> None:
    """Refuse settings that the optimizer refuses or with which it would not train, before anything is read.

    Raises:
        ValueError: naming the setting, or with torch's words.
    """
    try:
        optimizer = create([{"params": [nn.Parameter(torch.zeros(2, 2))], "name": "decayed"}])
    except ValueError as error:
        raise SettingError(f"model.optimizer: {str(error)[:1].lower()}{str(error)[1:]}") from error
    for name, least in {"lr": "above 0", "weight_decay": "at least 0", "momentum": "at least 0"}.items():
        for value in (group[name] for group in optimizer.param_groups if group.get(name) is not None):
            number = float(value)
            if not (number > 0 if name == "lr" else number >= 0) or number == float("inf"):
                raise SettingError(f"model.optimizer.{name} must be {least} and finite, got {number:g}")


def scale_new_parts(optimizer: Optimizer, new_parts: NewParts) -> None:
    """Give the new parts of a fresh optimizer their learning rate."""
    for group in optimizer.param_groups:
        if group["name"].startswith(NEW):
            group["lr"] *= new_parts.lr_factor


def frozen_groups(optimizer: Optimizer, new_parts: NewParts, step: int) -> list[dict[str, Any]]:
    """The groups that the optimizer step `step`, counted from 0, leaves as they are."""
    others = [group for group in optimizer.param_groups if not group["name"].startswith(NEW)]
    return others if step < new_parts.freeze_others_steps and len(others) < len(optimizer.param_groups) else []


def group_schedules(
    optimizer: Optimizer, new_parts: NewParts, schedule: "Schedule", total_steps: int
) -> list[Callable[[int], float]]:
    """Multiple of its learning rate by step, for each group: 0 while it is frozen, then the schedule from its start."""

    def from_step(first: int) -> Callable[[int], float]:
        return lambda step: 0.0 if step < first else schedule.factor(step - first, total_steps - first)

    late = {group["name"] for group in frozen_groups(optimizer, new_parts, step=0)}
    return [from_step(new_parts.freeze_others_steps * (group["name"] in late)) for group in optimizer.param_groups]


class Schedule(ABC):
    """Learning rate over a run, as a multiple of the optimizer's.

    Args:
        warmup_steps: steps of linear warm-up, the first at 1 / warmup_steps.
        final_ratio: multiple of the learning rate that the run ends towards.
    """

    def __init__(self, warmup_steps: int = 100, final_ratio: float = 0.1) -> None:
        check_arguments(Schedule.__init__, locals(), "schedule.")
        if warmup_steps < 0:
            raise SettingError(f"schedule.warmup_steps must be at least 0, got {warmup_steps}")
        if not 0 <= final_ratio <= 1:
            raise SettingError(f"schedule.final_ratio must be from 0 to 1, got {final_ratio}")
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
        check_arguments(WarmupStableDecay.__init__, locals(), "schedule.")
        if not 0 < decay_ratio <= 1:
            raise SettingError(f"schedule.decay_ratio must be above 0 and at most 1, got {decay_ratio}")
        self.decay_ratio = decay_ratio

    def after_warmup(self, step: int, total_steps: int) -> float:
        """1 until the decay begins."""
        decay_steps = max(self.decay_ratio * total_steps, 1.0)
        return self._fall((step - (total_steps - decay_steps)) / decay_steps, "linear")
