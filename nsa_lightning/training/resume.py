"""What a resumed run takes over from its checkpoint, moments and steps, while its own settings hold."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from nsa_kernels.errors import SettingError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nsa_lightning.training.compat import set_last_rates
from nsa_lightning.training.distillation import Distillation
from nsa_lightning.training.optimizer import NEW, NewParts, Schedule

_SHAPES_STATE = ("amsgrad", "centered")
"""Switches of torch's optimizers that decide which state there is: it cannot be made up in the middle of a run."""
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
"""Settings of an optimizer that change how it computes and not what."""


class ConfiguredSchedule(LambdaLR):
    """Learning rates by the step that a checkpoint is at and the rates that are configured now."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the step alone."""
        super().load_state_dict(state_dict | {"base_lrs": self.base_lrs})
        rates = [base * factor(self.last_epoch) for base, factor in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        set_last_rates(self, rates)


def training_settings(
    optimizer: Optimizer, schedule: Schedule, max_steps: int, new_parts: NewParts, distillation: Distillation
) -> dict[str, Any]:
    """What a checkpoint keeps of the settings, in plain types, beside those in the optimizer's groups."""
    return {
        "model.optimizer": type(optimizer).__name__,
        "trainer.max_steps": max_steps,
        "model.schedule": type(schedule).__name__,
        **_flat("model.schedule", vars(schedule)),
        **_flat("model.new_parts", asdict(new_parts)),
        **_flat("model.distillation", asdict(distillation)),
    }


def _flat(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = (int, float, str, type(None))
    return {f"{prefix}.{name}": v if isinstance(v, plain) else repr(v) for name, v in settings.items()}


def keep_configured(
    optimizer: Optimizer, state: dict[str, Any], saved_settings: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The state that an optimizer is to load: the checkpoint's moments, under the settings that are configured.

    One line tells which of the settings differ from those that the checkpoint was trained with.

    Args:
        optimizer: as it is configured.
        state: of an optimizer, from the checkpoint.
        saved_settings: `training_settings` of the checkpoint; empty in those of older versions.
        settings: of this run.

    Raises:
        ValueError: the checkpoint holds the state of another optimizer.
    """
    saved, own = state["param_groups"], optimizer.param_groups
    _check_same_optimizer(saved_settings, settings, saved, own)
    changed = [
        f"{name} was {saved_settings[name]}, is {value}"
        for name, value in settings.items()
        if saved_settings.get(name, value) != value
    ]
    for before, now in zip(saved, own, strict=False):
        changed += _changes(before, now)
    if changed:
        rank_zero_warn(
            "settings differ from those that the checkpoint was trained with, and hold from here on: "
            + "; ".join(dict.fromkeys(changed))
        )
    groups = [
        before | {key: value for key, value in now.items() if key != "params"}
        for before, now in zip(saved, own, strict=False)
    ]
    return state | {"param_groups": groups + saved[len(groups) :]}  # torch says that their number differs


def _check_same_optimizer(
    saved_settings: Mapping[str, Any],
    settings: Mapping[str, Any],
    saved: list[dict[str, Any]],
    own: list[dict[str, Any]],
) -> None:
    before, now = (each.get("model.optimizer") for each in (saved_settings, settings))
    if before is None:  # a checkpoint of an older version: its settings tell
        numbers = [
            {key for key, value in groups[0].items() if key not in ("params", "initial_lr") and _is_number(value)}
            for groups in (saved, own)
        ]
        before = now if numbers[0] == numbers[1] else f"one that has {', '.join(sorted(numbers[0]))}"
    if before != now:
        raise SettingError(
            f"model.optimizer must stay as it was to resume: the checkpoint was trained with {before}, now it is {now}"
        )
    for name in _SHAPES_STATE:
        old, new = (groups[0].get(name, False) for groups in (saved, own))
        if old != new:
            raise SettingError(
                f"model.optimizer.init_args.{name} must stay as it was to resume: "
                f"the checkpoint was trained with {old}, now it is {new}"
            )


def _is_number(value: Any) -> bool:
    value = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(value, int | float) and not isinstance(value, bool)


def _changes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Settings of a group that differ, as `name was …, is …`; the learning rate before its schedule."""
    found = []
    for key in own.keys() & saved.keys() - {"params", "name", "lr", *_IMPLEMENTATION}:
        old, new = (tuple(x) if isinstance(x, list) else x for x in (saved[key], own[key]))
        if old != new:
            label = "lr" if key == "initial_lr" else key
            whose = " of the new parts" if own.get("name", "").startswith(NEW) and key == "initial_lr" else ""
            found.append(f"model.optimizer.init_args.{label}{whose} was {old}, is {new}")
    return sorted(found)
