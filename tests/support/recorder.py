"""Sees which operators of the kernels run, and with what."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OperatorRecorder(TorchDispatchMode):
    """Notes every call of an operator of `nsa_kernels` that is carried out, as (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsa_kernels":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    def count(self, operator: torch._ops.OpOverload) -> int:
        return sum(func is operator for func, _ in self.calls)
