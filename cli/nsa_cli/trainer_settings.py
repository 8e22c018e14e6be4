"""The trainer's settings that Lightning takes without a word although they make no sense, refused by name."""

import math
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from jsonargparse import Namespace
from nsa_kernels.errors import SettingError

_MAX_SEED = 2**32 - 1
_AT_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "fast_dev_run": 0,
    "limit_train_batches": 0,
    "limit_val_batches": 0,
    "limit_test_batches": 0,
    "limit_predict_batches": 0,
    "log_every_n_steps": 0,
    "min_epochs": 0,
    "min_steps": 0,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "overfit_batches": 0,
    "reload_dataloaders_every_n_epochs": 0,
}
_SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
"""At most 1 if they are fractions."""


def check_trainer_settings(trainer: Namespace, command: str) -> None:
    """Refuse signs and zeros that make no sense.

    Args:
        trainer: settings of the trainer, as parsed.
        command: what it is to do.

    Raises:
        SettingError: naming the setting, the rule and the value.
    """
    for name, least in _AT_LEAST.items():
        _check(trainer, name, f"at least {least}", least.__le__)
    for name in _SHARES:
        _check(trainer, name, "at most 1.0 where it is a fraction", lambda value: isinstance(value, int) or value <= 1)
    _check(trainer, "gradient_clip_val", "at least 0 and finite (0 clips nothing)", lambda value: 0 <= value < math.inf)
    _check_interval(trainer.get("val_check_interval"))
    _check_time("max_time", trainer.get("max_time"))
    needed = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}[command]
    _check(trainer, f"limit_{needed}_batches", f"above 0 for nsa {command}", lambda value: value > 0)
    if command == "fit":
        if trainer.max_steps < 1:
            raise SettingError(
                f"trainer.max_steps must be at least 1, got {trainer.max_steps}: "
                "the learning-rate schedule ends there. Set --trainer.max_steps"
            )
        _check(trainer, "max_epochs", "at least 1, or -1 for no limit", lambda value: value >= 1 or value == -1)


def check_seed(seed: int | bool) -> None:
    """Refuse a seed that the generators do not take.

    Raises:
        SettingError: it is negative or too large.
    """
    if not isinstance(seed, bool) and not 0 <= seed <= _MAX_SEED:
        raise SettingError(f"seed_everything must be from 0 to {_MAX_SEED}, got {seed}")


def _check(trainer: Namespace, name: str, rule: str, holds: Callable[[Any], bool]) -> None:
    value = trainer.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and not holds(value):
        raise SettingError(f"trainer.{name} must be {rule}, got {value}")


def _check_interval(value: Any) -> None:
    """`val_check_interval` is a number of batches, a share of an epoch or a time."""
    if isinstance(value, int | float):
        if not value > 0 or (isinstance(value, float) and value > 1):
            raise SettingError(
                "trainer.val_check_interval must be a number of batches of at least 1 or a share of an epoch above 0.0 "
                f"and at most 1.0, got {value}; trainer.limit_val_batches=0 turns validation off"
            )
    else:
        _check_time("val_check_interval", value)


def _check_time(name: str, value: Any) -> None:
    """A time is a `timedelta`, its arguments or DD:HH:MM:SS; Lightning refuses other texts itself."""
    if isinstance(value, str):
        parts = value.strip().split(":")
        if len(parts) != 4 or not all(part.isdigit() for part in parts):
            raise SettingError(f"trainer.{name} must be a time, DD:HH:MM:SS, got {value}")
        days, hours, minutes, seconds = map(int, parts)
        value = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(value, dict | Namespace):
        value = timedelta(**(vars(value) if isinstance(value, Namespace) else value))
    if isinstance(value, timedelta) and value <= timedelta():
        raise SettingError(f"trainer.{name} must be above 0, got {value}")
