"""Checkpoints as directories: every rank writes its shards, any number of ranks reads them.

Tensors lie in torch's distributed format under `state_dict.NAME` and `optimizer_states.INDEX.NAME.KEY`; everything else
is in `meta.pt`, written last. So nothing in a directory has to be unpickled without restraint.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from nsa_kernels.errors import SettingError
from torch import Tensor
from torch.distributed.checkpoint import metadata as storage
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from nsa_lightning.checkpoint.compat import SafeReader
from nsa_lightning.data.storage import system_error

META = "meta.pt"

_ZIP_START, _ZIP_END, _ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22
"""How a tensor in a shard begins, and its last bytes: torch writes each as a zip archive without a comment."""

Names = list[str]  # of parameters, in the order of their optimizer's groups


@contextmanager
def saving(path: Path, temporary: Path, removes: bool) -> Iterator[None]:
    """Say which checkpoint the disk would not take, where torch raises what failed on every rank as one error.

    Args:
        path: the checkpoint.
        temporary: what was written of it.
        removes: whether this rank removes that.

    Raises:
        ValueError: a rank could not write.
    """
    try:
        yield
    except BaseException as error:  # torch's own is no Exception
        if removes:
            shutil.rmtree(temporary, ignore_errors=True)
        failures = error.failures.values() if isinstance(error, CheckpointException) else []
        causes = [cause for failed, _ in failures if (cause := system_error(failed)) is not None]
        if not causes:
            raise
        raise SettingError(f"{path} cannot be written: {causes[0].strerror or causes[0]}") from error


def split(checkpoint: dict[str, Any], orders: list[Names]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part a checkpoint of one file's layout into tensors by name and the rest.

    Args:
        checkpoint: `state_dict`, `optimizer_states` as torch numbers them, and more.
        orders: what those numbers stand for, by optimizer.
    """
    rest = dict(checkpoint)
    tensors = {f"state_dict.{name}": tensor for name, tensor in rest.pop("state_dict").items()}
    groups, values = [], []
    for index, (state, order) in enumerate(zip(rest.pop("optimizer_states", []), orders, strict=False)):
        groups.append([group | {"params": [order[i] for i in group["params"]]} for group in state["param_groups"]])
        entries = {(order[i], key): value for i, entry in state["state"].items() for key, value in entry.items()}
        values.append([(*name, value) for name, value in entries.items() if not isinstance(value, Tensor)])
        tensors |= {
            f"optimizer_states.{index}.{name}.{key}": value
            for (name, key), value in entries.items()
            if isinstance(value, Tensor)
        }
    return tensors, rest | {"optimizer_groups": groups, "optimizer_values": values}


def join(tensors: dict[str, Tensor], meta: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `split`."""
    meta = dict(meta)
    groups_of, values_of = meta.pop("optimizer_groups"), meta.pop("optimizer_values")
    prefix = "state_dict."
    kept = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    states = []
    for index, (groups, values) in enumerate(zip(groups_of, values_of, strict=True)):
        numbers = {name: i for i, name in enumerate(chain.from_iterable(group["params"] for group in groups))}
        state: dict[int, dict[str, Any]] = {}
        for name, key, value in chain(_entries(tensors, f"optimizer_states.{index}."), values):
            state.setdefault(numbers[name], {})[key] = value
        numbered = [group | {"params": [numbers[name] for name in group["params"]]} for group in groups]
        states.append({"state": state, "param_groups": numbered})
    return meta | {"state_dict": kept, "optimizer_states": states}


def _entries(tensors: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, Any]]:
    """Parameter, key and value of an optimizer's entries."""
    for full, value in tensors.items():
        if full.startswith(prefix):
            name, _, key = full.removeprefix(prefix).rpartition(".")
            yield name, key, value


def read_contents(path: Path) -> dict[str, storage.TensorStorageMetadata]:
    """Sizes and dtypes of the tensors of a sharded checkpoint, by name."""
    contents = SafeReader(path).read_metadata().state_dict_metadata
    return {name: entry for name, entry in contents.items() if isinstance(entry, storage.TensorStorageMetadata)}


def check_shards(path: Path) -> None:
    """Look at the size and the ends of every rank's file: what is missing, truncated or overwritten is found.

    Raises:
        ValueError: a file is not what was written.
    """
    spans: dict[str, tuple[int, int]] = {}
    for info in (SafeReader(path).read_metadata().storage_data or {}).values():
        first, end = spans.get(info.relative_path, (info.offset, 0))
        spans[info.relative_path] = min(first, info.offset), max(end, info.offset + info.length)
    for name, (first, end) in sorted(spans.items()):
        file = path / name
        if not file.is_file():
            raise SettingError(f"its file {name} is missing")
        if file.stat().st_size < end:
            raise SettingError(f"its file {name} is truncated: {file.stat().st_size} bytes of {end}")
        with file.open("rb") as content:
            content.seek(first)
            begins = content.read(len(_ZIP_START))
            content.seek(end - _ZIP_END_SIZE)
            ends = content.read(len(_ZIP_END))
        if (begins, ends) != (_ZIP_START, _ZIP_END):
            raise SettingError(f"its file {name} does not hold what was written")


def read_meta(path: Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside tensors."""
    return torch.load(path / META, weights_only=True, map_location="cpu")


def _load(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
    try:
        dcp.load(tensors, storage_reader=SafeReader(path), **options)
    except CheckpointException as failed:  # damage that only reading everything finds
        error, _ = next(iter(failed.failures.values()))
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise SettingError(f"the checkpoint {path} is damaged: {reason}") from failed


def _fill(tensors: dict[str, Tensor], path: Path) -> None:
    """Read tensors whole, in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be
        _load(tensors, path, no_dist=True)


def read_whole(path: Path) -> dict[str, Any]:
    """A sharded checkpoint in the layout of one file, in host memory; needs no other rank."""
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in read_contents(path).items()
    }
    _fill(tensors, path)
    return join(tensors, read_meta(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The parameters of a sharded checkpoint by name, in host memory, without the optimizer's state."""
    prefix = "state_dict."
    contents = {name: entry for name, entry in read_contents(path).items() if name.startswith(prefix)}
    tensors = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in contents.items()}
    _fill(tensors, path)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_shards(path: Path, parameters: dict[str, Tensor], optimizers: list[Optimizer]) -> dict[str, Any]:
    """A sharded checkpoint in the layout of one file, every rank its own shards.

    Args:
        path: the directory.
        parameters: the model's own tensors by name; they are overwritten.
        optimizers: over these parameters; not changed.
    """
    meta, contents = read_meta(path), read_contents(path)
    if not optimizers:
        meta |= {"optimizer_groups": [], "optimizer_values": []}
    wanted = {f"state_dict.{name}": tensor for name, tensor in parameters.items()}
    for index in range(len(optimizers)):
        prefix = f"optimizer_states.{index}."
        for name, key, entry in _entries(contents, prefix):
            like, dtype = parameters[name], entry.properties.dtype
            a_value_a_weight = entry.size == like.shape  # the count of steps is not
            wanted[f"{prefix}{name}.{key}"] = (
                torch.zeros_like(like, dtype=dtype) if a_value_a_weight else torch.zeros(entry.size, dtype=dtype)
            )
    _load(wanted, path)
    return join(wanted, meta)
