"""What a model runs on: the device, the type of its numbers, and whether the memory suffices."""

import os
from bisect import bisect_right
from pathlib import Path
from typing import Literal, get_args

import torch
from nsa_kernels.errors import SettingError

from nsa_lightning.model.cached import Cache
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MEMORY = Path("/proc/meminfo")


def use_device(name: str) -> torch.device:
    """The device of that name, a GPU made the current one; `auto` is a GPU if there is one.

    Raises:
        ValueError: it is neither a CPU nor a GPU that PyTorch can use.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise SettingError(f"device must be auto, cpu, cuda or a GPU by its number such as cuda:1, got {name}")
    if device.type == "cpu":
        return device
    number = device.index or 0
    if number >= torch.cuda.device_count():
        raise SettingError(
            f"device must be one that PyTorch can use, got {name}: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs"
        )
    torch.cuda.set_device(number)  # kernels, streams and graphs go there
    return torch.device("cuda", number)


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The type of that name; `auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: there is no such name.
    """
    if name not in get_args(DtypeName):
        raise SettingError(f"dtype must be one of {', '.join(get_args(DtypeName))}, got {name!r}")
    return _DTYPES.get(name, torch.bfloat16 if device.type == "cuda" else torch.float32)


def check_memory(
    config: TransformerConfig, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse a model and a cache that the device has no memory for, before anything is allocated.

    Args:
        config: of the model.
        batch_size: sequences in the cache.
        capacity: tokens of the longest of them, prompt and continuation.
        device: of both.
        dtype: of both.

    Raises:
        ValueError: says how many tokens would fit.
    """
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in Transformer(config).parameters()) * dtype.itemsize

    def needed(tokens: int) -> int:
        return Cache.bytes_needed(config, batch_size, tokens, dtype)

    free = free_memory(device) - weights
    if needed(capacity) > free:
        fitting = bisect_right(range(1, capacity), free, key=needed)
        raise SettingError(
            f"batch_size and the longest prompt with max_new_tokens must fit the memory of {device}: a cache of "
            f"{batch_size} x {capacity} tokens takes {needed(capacity) / 1e9:.2f} GB, beside the weights "
            f"{max(free, 0) / 1e9:.2f} GB are free, enough for {batch_size} x {fitting}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMORY.is_file():  # the whole memory, where the system does not tell more
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    lines = _MEMORY.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
