"""The measured tolerance: a kernel may stray from the truth at most twice as far as plain PyTorch in the same dtype."""

from collections.abc import Callable

import torch
from nsa_kernels import NSAConfig, native_sparse_attention
from torch import Tensor

from support.packings import Inputs

Values = dict[str, Tensor]
"""Outputs by name, and gradients as `d name`."""


def evaluate(function: Callable[[Inputs], Values], inputs: Inputs) -> Values:
    """Outputs of `function`, and the gradient of its first output for every leaf of `inputs`.

    The cotangent is the same in every call, whatever the dtype: eighths up to 2, exact in all of them. A leaf that
    the output does not depend on has a gradient of zeros.
    """
    outputs, leaves = function(inputs), inputs.leaves()
    first = next(iter(outputs.values()))
    eighths = torch.randint(-16, 17, first.shape, generator=torch.Generator().manual_seed(1)) / 8
    if first.requires_grad:
        gradients = torch.autograd.grad(
            first, list(leaves.values()), eighths.to(first), allow_unused=True, materialize_grads=True
        )
    else:
        gradients = tuple(torch.zeros_like(leaf) for leaf in leaves.values())
    named = {f"d {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: output.detach() for name, output in outputs.items()} | named


def attend(inputs: Inputs, config: NSAConfig, backend: str, block_indices: Tensor | None = None) -> Values:
    """Output and gradients of the whole operator, and the blocks that it attended to."""
    return evaluate(
        lambda x: native_sparse_attention(
            **x._asdict(), config=config, backend=backend, block_indices=block_indices
        )._asdict(),
        inputs,
    )


def assert_strays_at_most_twice_as_far(actual: Values, plain: Values, truth: Values, epsilon: float) -> set[str]:
    """Compare each value by its norm and by its largest entry.

    Args:
        actual: what the kernels computed.
        plain: what PyTorch computed in the same dtype.
        truth: the same in a wider dtype.
        epsilon: error that is always allowed, as a fraction of the truth's size, or of a tensor of ones if the truth
            is smaller: gradients that cancel are rounding errors alone.

    Returns:
        The names of the values that are not zero, for the caller to see that something was compared.
    """
    assert actual.keys() == plain.keys() == truth.keys()
    for name, exact in truth.items():
        assert actual[name].shape == plain[name].shape == exact.shape, name
        assert actual[name].dtype == plain[name].dtype, name
        exact, ones = exact.double(), torch.ones_like(exact, dtype=torch.float64)  # noqa: PLW2901
        for measure in (torch.linalg.vector_norm, _largest):
            allowed = epsilon * max(measure(exact), measure(ones)).item()
            error, plain_error = (measure(values[name].double() - exact).item() for values in (actual, plain))
            assert error <= 2 * plain_error + allowed, (
                f"{name} strays by {error:.3g}, plain PyTorch by {plain_error:.3g}; always allowed is {allowed:.3g}"
            )
    return {name for name, exact in truth.items() if exact.any()}


def _largest(x: Tensor) -> Tensor:
    return x.abs().amax()
