"""A checkpoint of `nsa fit` without the numbers in its tensors: what it holds, and whether it is complete."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.checkpoint.sharded import META, check_shards, read_contents, read_meta


def read_summary(path: Path, setting: str = "ckpt_path") -> dict[str, Any]:
    """A checkpoint without the numbers in its tensors; `setting` is what the user calls it.

    Raises:
        ValueError: it is incomplete, or none of ours.
    """
    if path.is_dir() and not (path / META).is_file():
        raise SettingError(f"{setting} must be a checkpoint of nsa fit, got the directory {path}, which lacks {META}")
    try:
        if path.is_dir():
            check_shards(path)
            summary = read_meta(path)
            shapes = {name: torch.empty(entry.size, device="meta") for name, entry in read_contents(path).items()}
            prefix = "state_dict."
            own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
            summary["state_dict"] = own
        else:
            summary = torch.load(path, mmap=True, weights_only=True, map_location="meta")
    except Exception as error:  # anything may stand in a file: what went wrong is said, and the file is named
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise SettingError(f"{setting} must be a checkpoint of nsa fit, got {path}: {reason}") from error
    missing = {"state_dict", "pytorch-lightning_version"} - set(summary)
    if missing:
        raise SettingError(f"{setting} must be a checkpoint of nsa fit, got {path}, which lacks {sorted(missing)}")
    return summary


def check_same_sizes(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint of another model, naming what differs.

    Raises:
        ValueError: a parameter is missing on one side or has another shape.
    """
    differing = [
        f"{name} is {_shape(saved, name)} in the checkpoint and {_shape(own, name)} in the model"
        for name in sorted(own.keys() | saved.keys())
        if _shape(own, name) != _shape(saved, name)
    ]
    if differing:
        raise SettingError(
            f"ckpt_path must hold a model of the configured sizes; {len(differing)} parameters differ, "
            f"first: {'; '.join(differing[:3])}. Check model.transformer and data.tokenizer"
        )


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return str(tuple(state[name].shape)) if name in state else "missing"
