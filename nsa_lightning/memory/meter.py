"""Counts the bytes that operators allocate and free, each by what it is for."""

import weakref
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_lightning.memory.compat import (
    TorchDispatchMode,
    call_implementation,
    schema_name,
    storage_key,
    tree_map_only,
)

PARAMETERS, CAST_WEIGHTS = "parameters", "weights cast by autocast"
WORKSPACE = "attention workspace"

GRANULE = 512
"""PyTorch's allocator hands out multiples of so many bytes."""


class Place(NamedTuple):
    """Where in a step something happens."""

    what: str
    layer: int | None = None  # counted from the last if negative

    def named(self, num_layers: int) -> str:
        """In words, for a decoder of so many layers."""
        return self.what if self.layer is None else f"{self.what} {self.layer % num_layers}"


class Peak(NamedTuple):
    """The most that was alive at once."""

    total: int  # bytes
    kinds: dict[str, int]  # bytes by kind


class _Owner(NamedTuple):
    """What is known of a live storage."""

    reference: "weakref.ref[torch.UntypedStorage]"
    kind: str
    size: int


class MemoryMeter(TorchDispatchMode):
    """Follows the storages on one kind of device from allocation to release.

    A storage counts as the `kind` that is set when it appears. Attention operators run their own Python, so that what
    they allocate inside counts as well, as workspace.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.kind, self.place = "", Place("")
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[Place, Peak] = {}
        self._owners: dict[int, _Owner] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count what it returns for the first time."""
        kwargs = kwargs or {}
        if func.namespace == "nsa_kernels":
            with self.counting_as(WORKSPACE), self:
                out = call_implementation(func, args, kwargs)
            tree_map_only(Tensor, partial(self.label, kind=self.kind), out)
            return out
        scratch = scratch_bytes(func, args)
        self.charge(self.kind, scratch)
        out = func(*args, **kwargs)
        is_cast = func is torch.ops.aten._to_copy.default and self._kind_of(args[0]) == PARAMETERS
        tree_map_only(Tensor, partial(self._add, kind=CAST_WEIGHTS if is_cast else self.kind), out)
        self.charge(self.kind, -scratch)
        return out

    @contextmanager
    def counting_as(self, kind: str) -> Generator[None, None, None]:
        """Count what is allocated meanwhile as `kind`."""
        outer, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = outer

    def charge(self, kind: str, size: int) -> None:
        """Count bytes that no operator shows; negative ones are released."""
        self.live[kind] += size
        self.total += size
        peak = self.peaks.get(self.place)
        if peak is None or self.total > peak.total:
            self.peaks[self.place] = Peak(self.total, dict(self.live))

    def label(self, tensor: Tensor, kind: str) -> None:
        """Count a live tensor as another kind from here on."""
        key = storage_key(tensor.untyped_storage())
        if key in self._owners:
            reference, before, size = self._owners[key]
            self._owners[key] = _Owner(reference, kind, size)
            self.live[before] -= size
            self.live[kind] += size

    def ignore(self, tensor: Tensor) -> None:
        """Never count a tensor that was made outside."""
        self._own(tensor.untyped_storage(), "", 0)

    def _kind_of(self, tensor: Tensor) -> str | None:
        owner = self._owners.get(storage_key(tensor.untyped_storage()))
        return owner.kind if owner is not None else None

    def _add(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        if tensor.device.type == self.device_type and storage_key(storage) not in self._owners:
            size = -(-storage.nbytes() // GRANULE) * GRANULE
            self._own(storage, kind, size)
            self.charge(kind, size)

    def _own(self, storage: torch.UntypedStorage, kind: str, size: int) -> None:
        key = storage_key(storage)
        self._owners[key] = _Owner(weakref.ref(storage, partial(self._release, key)), kind, size)

    def _release(self, key: int, _: object) -> None:
        owner = self._owners.pop(key)
        self.charge(owner.kind, -owner.size)


def scratch_bytes(func: Any, args: Any) -> int:
    """Bytes that PyTorch's own operators need on a GPU while they run and do not show, where they are many."""
    name = schema_name(func)
    if name == "aten::sort":  # cub: indices in, and keys and indices a second time
        return int(args[0].numel() * (8 + 8 + args[0].element_size()))
    if name == "torch_attn::_varlen_attn_backward":  # dq in float32, dk and dv of every query head
        q, k = args[1], args[2]
        return int(4 * q.numel() + (2 * q.numel() * q.element_size() if q.shape[1] != k.shape[1] else 0))
    return 0
