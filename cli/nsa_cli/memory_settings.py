"""What of the settings of `nsa fit` decides about a step's memory."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from nsa_kernels.errors import SettingError

from nsa_lightning.memory.settings import StepSettings
from nsa_lightning.training.compat import ddp_option
from nsa_lightning.training.strategy import FSDP2Strategy

_DTYPES = {
    "32-true": (torch.float32, torch.float32),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, torch.bfloat16),
    "16-true": (torch.float16, torch.float16),
}
"""Of weights and of matrix products, by trainer.precision."""

_SHORT = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def step_settings(trainer: Mapping[str, Any], seq_len: int, batch_size: int, world_size: int | None) -> StepSettings:
    """The settings of a step of `nsa fit`.

    Args:
        trainer: the trainer's settings, its objects made.
        seq_len: tokens in a sequence.
        batch_size: sequences in a step on each GPU.
        world_size: GPUs; if not given, as many as the trainer's devices and nodes, one where devices is `auto`.

    Raises:
        ValueError: a strategy or a precision whose memory is not known, or GPUs that cannot be counted.
    """
    ranks = _world_size(trainer) if world_size is None else world_size
    if ranks < 1:
        raise SettingError(f"world_size must be at least 1, got {ranks}")
    precision = _SHORT.get(str(trainer["precision"]), str(trainer["precision"]))
    if precision not in _DTYPES:
        raise SettingError(f"trainer.precision must be one of {', '.join(_DTYPES)} for an estimate, got {precision}")
    strategy = _strategy(trainer["strategy"], ranks)
    if strategy["strategy"] == "fsdp2" and precision not in ("32-true", "bf16-mixed"):
        raise SettingError(
            f"trainer.precision must be 32-true or bf16-mixed with trainer.strategy=fsdp2, got {precision}"
        )
    parameter_dtype, compute_dtype = _DTYPES[precision]
    return StepSettings(
        world_size=ranks,
        parameter_dtype=parameter_dtype,
        compute_dtype=compute_dtype,
        seq_len=seq_len,
        batch_size=batch_size,
        accumulates=trainer["accumulate_grad_batches"] > 1,
        watches=trainer["logger"] is not False,
        **strategy,
    )


def _strategy(strategy: Any, world_size: int) -> dict[str, Any]:
    """The fields of StepSettings that the strategy decides."""
    if strategy == FSDP2Strategy.strategy_name:
        strategy = FSDP2Strategy()
    if isinstance(strategy, FSDP2Strategy):
        names = ("context_parallel_size", "cpu_offload", "reshard_after_forward", "reduce_every_batch")
        return {"strategy": "fsdp2"} | {name: getattr(strategy, name) for name in names}
    if isinstance(strategy, DDPStrategy):
        return {"strategy": "ddp", "bucket_view": ddp_option(strategy, "gradient_as_bucket_view", False)}
    if strategy == "auto":
        return {"strategy": "ddp" if world_size > 1 else "auto"}
    if isinstance(strategy, str) and strategy.startswith("ddp"):
        return {"strategy": "ddp"}
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    raise SettingError(f"trainer.strategy must be auto, ddp or fsdp2 for an estimate, got {name}")


def _world_size(trainer: Mapping[str, Any]) -> int:
    devices, nodes = trainer["devices"], trainer["num_nodes"]
    count = 1 if devices == "auto" else _count(devices)
    if count is None:
        raise SettingError(
            "trainer.devices must be a number of GPUs from 1 on, a list of different ones, or auto for one, "
            f"got {devices}; world_size says how many the run has"
        )
    if nodes < 1:
        raise SettingError(f"trainer.num_nodes must be at least 1, got {nodes}")
    return count * int(nodes)


def _count(devices: Any) -> int | None:
    """How many GPUs a number or a list of them stands for, as Lightning reads it; none if they cannot be counted."""
    if isinstance(devices, str):
        try:
            numbers = [int(part) for part in devices.split(",") if part.strip()]
        except ValueError:
            return None
        devices = numbers if "," in devices or not numbers else numbers[0]
    if isinstance(devices, list):
        return len(devices) if devices and min(devices) >= 0 and len(set(devices)) == len(devices) else None
    return int(devices) if devices >= 1 else None
