"""Is the device there that a measurement wants?"""

from nsa_kernels.errors import SettingError


def check_hardware(device: str, backend: str) -> None:
    """Make the device the current one.

    Raises:
        ValueError: there is no such device or backend.
    """
    from typing import get_args

    import torch
    from nsa_kernels.backends import Backend

    if backend not in get_args(Backend):
        raise SettingError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    try:
        torch.zeros(1, device=device)
        if device.startswith("cuda:"):
            torch.cuda.set_device(device)  # events are recorded on the current device
    except (RuntimeError, AssertionError) as error:  # torch has both for a device that it lacks
        reason = str(error).strip().split("\n")[0]
        raise SettingError(
            f"device must be hardware that PyTorch can use, got {device!r}: {reason}. "
            "For a smoke test: --device cpu --lengths 1500 --time_budget 0.1"
        ) from error
