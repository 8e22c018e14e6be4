"""What the estimate of memory needs of torch and Triton that they do not promise to keep.

tests/memory/test_compat.py checks each part.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

__all__ = [
    "DataDependentOutputException",
    "FakeTensorMode",
    "TorchDispatchMode",
    "call_implementation",
    "pretended_gpu",
    "schema_name",
    "storage_key",
    "tree_map_only",
    "without_launches",
]


def schema_name(operator: Any) -> str:
    """The name of an operator that a mode intercepts, without its overload: `aten::sort`."""
    return operator.name().partition(".")[0]


def call_implementation(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run the Python function of a `torch.library.custom_op` in the modes that are active, and not its fake."""
    return OPDEFS[schema_name(operator)]._init_fn(*args, **kwargs)


def storage_key(storage: torch.UntypedStorage) -> int:
    """What tells a live storage from others: the same for all tensors that share it, and whether or not it has data."""
    return storage._cdata


@contextmanager
def pretended_gpu(capability: tuple[int, int], multiprocessors: int) -> Generator[None, None, None]:
    """Within, tensors of any device say that they are on a GPU, and there is one of this kind."""
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.get_device_capability", return_value=capability))
        stack.enter_context(patch("torch.cuda.get_device_properties", return_value=properties))
        stack.enter_context(patch.object(Tensor, "is_cuda", True))
        yield


@contextmanager
def without_launches() -> Generator[None, None, None]:
    """Within, Triton's kernels are neither compiled nor interpreted nor launched where they are called."""
    from triton import knobs
    from triton.runtime.jit import KernelInterface

    with knobs.runtime.scope(), patch.object(KernelInterface, "__getitem__", lambda kernel, grid: _no_launch):
        knobs.runtime.interpret = False
        yield


def _no_launch(*args: object, **kwargs: object) -> None:
    """A kernel that computes nothing."""
