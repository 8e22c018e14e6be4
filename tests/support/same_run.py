"""Two runs of `support.training.fit` that must not differ."""

import pytest
import torch


def assert_same_run(actual, expected, *, steps=None, relative=1e-5, tolerance=1e-4, tensors=("gradients", "weights")):
    """Losses, norms, the last gradients and weights, within what float32 sums in another order differ by.

    Tensors may differ by a share of the largest number in each. `actual` may have gone on from a checkpoint and have
    the last `steps` steps alone.
    """
    steps = len(expected["losses"]) if steps is None else steps
    for name in ("losses", "norms"):
        assert actual[name] == pytest.approx(expected[name][-steps:], rel=relative)
        assert len(actual[name]) == steps
    for name in tensors:
        assert actual[name].keys() == expected[name].keys()
        for key, value in expected[name].items():
            torch.testing.assert_close(actual[name][key], value, rtol=0, atol=tolerance * float(value.abs().max()))
