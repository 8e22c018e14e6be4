"""What the model needs of torch that it does not promise to keep; tests/model/test_compat.py checks each part."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor


def operator_name(operator: Any) -> str:
    """The name of an operator that a mode intercepts, `aten::sort` or `aten::sort.stable`; empty for what is none."""
    return operator.name() if isinstance(operator, torch._ops.OpOverload) else ""


def all_to_all(tensors: Sequence[Tensor], group_name: str) -> list[Tensor]:
    """Exchange tensors with the ranks of a group: part s of the first dimension goes to rank s, in equal parts."""
    group = cast("Any", group_name)  # a type of its own from torch 2.13 on
    sent = [all_to_all_single(x, None, None, group) for x in tensors]
    return [wait_tensor(x) for x in sent]
