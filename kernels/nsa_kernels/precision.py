"""Arithmetic that autocast leaves alone, and that a gradient of zero passes without a trace.

The operator computes in the dtypes of its inputs and sums in float32, forward and backward. Autocast would cast its
matrix products to half precision: within the forward by the caller's context, and in the backward of PyTorch's own
functions too, where that runs in such a context or is compiled in one. What an operator computes stands therefore in
`without_autocast`, and products that PyTorch differentiates are functions of their own.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which tensors on the device of x are computed as they are."""
    device = x.device.type
    if _has_autocast(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch 2.11 breaks the graph here
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def computed_as_given(function: Callable[P, R]) -> Callable[P, R]:
    """Let autocast change nothing within a function of queries, its first argument."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        queries: Any = args[0] if args else kwargs["q"]
        with without_autocast(queries):
            return function(*args, **kwargs)

    return call


def contract(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """`torch.einsum` of two tensors, each index of one being in the other or in the result."""
    return _Contraction.apply(equation, a, b)


class _Contraction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, equation: str, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.equation = equation
        with without_autocast(a):
            return torch.einsum(equation, a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor]:
        (a, b), (inputs, out) = ctx.saved_tensors, ctx.equation.split("->")
        left, right = inputs.split(",")
        return None, contract(f"{out},{right}->{left}", grad, b), contract(f"{out},{left}->{right}", grad, a)


def linear_map(x: Tensor, weight: Tensor, *, activated: bool = False) -> Tensor:
    """x [H, C, X] times weight [H, X, M], or silu(x) times it; rows of x without a gradient give the weight none.

    They may then hold anything: 0 times infinity would be NaN.
    """
    return _LinearMap.apply(x, weight, activated)


class _LinearMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, activated: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.activated = activated
        with without_autocast(x):
            return torch.bmm(torch.nn.functional.silu(x) if activated else x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        with without_autocast(x):
            x = x.where((grad != 0).any(-1, keepdim=True), 0.0)
            grad_x = torch.bmm(grad, weight.mT)
            if not ctx.activated:
                return grad_x, torch.bmm(x.mT, grad), None
            hidden = torch.nn.functional.silu(x)
            grad_x = torch.ops.aten.silu_backward(grad_x, x)
            return grad_x, torch.bmm(hidden.mT, grad), None
