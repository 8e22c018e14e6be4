"""Weights in safetensors files: read tensor by tensor, written shard by shard."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsa_lightning.model.initialization import copy_whole
from nsa_lightning.model.transformer import Transformer

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Entry(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightFiles:
    """The tensors of a directory with `model.safetensors`, or with shards and their index; read one at a time.

    Args:
        directory: where the files are.
        setting: what the user calls it, for error messages.

    Raises:
        ValueError: files are missing, truncated or disagree with their index, or a dtype is none of a weight's.
    """

    def __init__(self, directory: Path, setting: str) -> None:
        self.directory, self.setting = directory, setting
        index = directory / INDEX
        if not index.is_file() and not (directory / SINGLE).is_file():
            raise SettingError(f"{setting} must be a directory with {SINGLE} or {INDEX}, got {directory}")
        listed: dict[str, str] | None = None
        if not (directory / SINGLE).is_file():  # where both are, transformers reads the one file
            try:
                listed = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise SettingError(f"{setting}: {index} is no index of safetensors files: {error!r}") from error
        self._entries: dict[str, _Entry] = {}
        self.files = [directory / file for file in sorted(set(listed.values()))] if listed else [directory / SINGLE]
        for file in self.files:
            self._entries |= self._contents(file)
        lost = sorted(listed.keys() - self._entries.keys()) if listed else []
        if lost:
            raise SettingError(f"{setting}: {index} lists tensors that its files lack: {_some(lost)}")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, by name."""
        return {name: entry.shape for name, entry in self._entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._entries[name].dtype

    @property
    def largest_file(self) -> int:
        """Bytes of the largest file."""
        return max(file.stat().st_size for file in self.files)

    def read(self, name: str) -> Tensor:
        """One tensor, in host memory."""
        with safe_open(self._entries[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def check(self, model: Transformer) -> None:
        """Refuse files that do not hold exactly the parameters of a model, or old checkpoints' tables beside them.

        Raises:
            ValueError: names what is missing, left over or of another shape.
        """
        expected = {hugging_face_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
        optional = {name for name in self.shapes if name.endswith("rotary_emb.inv_freq")}
        optional |= {"lm_head.weight"} if model.config.tie_embeddings else set()
        shapes = self.shapes
        missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys() - optional)
        if missing or extra:
            kinds = [f"lacks {_some(missing)}"] * bool(missing) + [f"has left over {_some(extra)}"] * bool(extra)
            raise SettingError(f"{self.setting}={self.directory} does not fit its config: it {' and '.join(kinds)}")
        other = [
            f"{name} is {shapes[name]}, must be {shape}" for name, shape in expected.items() if shapes[name] != shape
        ]
        if other:
            raise SettingError(f"{self.setting}={self.directory} does not fit its config: {_some(other)}")

    def _contents(self, path: Path) -> dict[str, _Entry]:
        entries = {}
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() not in DTYPES:
                        raise SettingError(
                            f"{self.setting}: tensors must be one of {', '.join(DTYPES)}, got {part.get_dtype()} "
                            f"for {name} in {path}"
                        )
                    entries[name] = _Entry(path, tuple(part.get_shape()), DTYPES[part.get_dtype()])
        except (OSError, SafetensorError) as error:
            raise SettingError(f"{self.setting}: {path} is no whole safetensors file: {error}") from error
        return entries


def has_own_head(directory: Path, setting: str) -> bool:
    """Whether a directory has weights, and among them an output layer that is not its embedding.

    Raises:
        ValueError: its files are broken.
    """
    if not any((directory / name).is_file() for name in (SINGLE, INDEX)):
        return False
    weights = WeightFiles(directory, setting)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    if any(name not in weights.shapes for name in names):
        return False
    embedding, head = (weights.read(name) for name in names)
    return not torch.equal(embedding, head)


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write `model.safetensors`, or shards of at most about `shard_bytes` and their index.

    Args:
        directory: an existing one, without weights.
        tensors: names and tensors, drawn one at a time; memory is held for one shard.
        shard_bytes: a larger tensor gets a shard of its own.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            shards.append(_write_shard(directory, len(shards), held))
            held, size = {}, 0
        held[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_write_shard(directory, len(shards), held))
    if len(shards) == 1:
        _shard_path(directory, 0).rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        final = directory / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _shard_path(directory, number).rename(final)
        weight_map |= dict.fromkeys(names, final.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def load_weights(model: Transformer, weights: WeightFiles) -> None:
    """Write the tensors of a directory into the decoder's parameters, one at a time, cast to their dtype.

    Args:
        model: its parameters may be shards; every rank reads whole tensors and keeps its part.
        weights: the tensors.

    Raises:
        ValueError: tensors are missing, left over or of another shape.
    """
    weights.check(model)
    for name, parameter in model.named_parameters():
        copy_whole(parameter, weights.read(hugging_face_name(name)).to(parameter.dtype))


def hugging_face_name(name: str) -> str:
    """The name in a Hugging Face directory of a parameter of the decoder."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"model-{number + 1:05d}.safetensors"


def _write_shard(directory: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, _shard_path(directory, number), metadata={"format": "pt"})
    return list(tensors)


def _some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
