"""What the benchmarks need of torch that it does not promise to keep; tests/benchmark/test_compat.py checks it."""

import torch
from torch.profiler import profile


def profiled_events(profiled: profile, device: torch.autograd.DeviceType) -> list[tuple[str, tuple[int, int]]]:
    """Name, start and end of what ran on a kind of device, in nanoseconds, without the summary that torch makes of it.

    Args:
        profiled: has been stopped.
        device: the kind.
    """
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    return [
        (event.name(), (event.start_ns(), event.start_ns() + event.duration_ns()))
        for event in events
        if event.device_type() == device
    ]
