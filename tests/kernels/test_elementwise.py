"""Rotation, the gated product and the norm of a sum: the kernels, and plain PyTorch where a gradient is wanted."""

import pytest
import torch
from nsa_kernels.elementwise import add_norm, rotate, silu_product
from nsa_kernels.rotary import apply_rotary
from support.gpu import DTYPES, epsilon
from support.measured import assert_strays_at_most_twice_as_far
from torch import Tensor

kernels = pytest.importorskip("nsa_kernels.triton.elementwise", exc_type=ImportError)

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")


@interpreted
@pytest.mark.parametrize(("head_dim", "half"), [(80, 20), (24, 5), (64, 32)])
def test_the_kernel_rotates_as_plain_torch(head_dim, half):
    T, H = 13, 3
    cos, sin = torch.randn(2, T, half)
    for x in (torch.randn(T, H, head_dim), torch.randn(T, H + 2, head_dim)[:, 1:-1], torch.randn(T, head_dim, H).mT):
        torch.testing.assert_close(kernels.launch_rotate(x, cos, sin), apply_rotary(x, cos, sin))


@interpreted
def test_the_kernel_multiplies_halves_of_one_projection_as_plain_torch():
    for joint in (torch.randn(3, 2 * 1100), torch.randn(2 * 40, 5).T, 20 * torch.randn(4, 2 * 7)):
        gate, up = joint.chunk(2, dim=-1)
        torch.testing.assert_close(kernels.launch_silu_product(gate, up), torch.nn.functional.silu(gate) * up)


@interpreted
def test_the_kernel_norms_a_sum_as_plain_torch():
    for x, change in (torch.randn(2, 5, 48), torch.randn(2, 3, 50)[..., 1:-1], torch.randn(2, 48, 4).mT):
        weight = torch.randn(48)
        total, out = kernels.launch_add_norm(x, change, weight, 1e-3)
        torch.testing.assert_close(total, x + change)
        torch.testing.assert_close(out, torch.nn.functional.rms_norm(x + change, (48,), weight, 1e-3))


def test_where_a_gradient_is_wanted_they_pass_it():
    x, gate, up = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    cos, sin = torch.randn(2, 3, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(rotate, (x, cos, sin))
    assert torch.autograd.gradcheck(silu_product, (gate, up))
    x, change, weight = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 4), (3, 4), (4,)))
    assert torch.autograd.gradcheck(add_norm, (x, change, weight, 1e-5))


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_are_as_right_as_plain_torch(dtype):
    kind, T = DTYPES[dtype], 3000
    for head_dim, half in ((64, 32), (80, 20), (192, 32), (256, 128)):
        x, rotary = random(T, 10, head_dim, dtype=kind)[:, 1:], random(2, T, half, dtype=torch.float32)
        with torch.no_grad():
            named = {"out": rotate(x, *rotary)}, {"out": apply_rotary(x, *rotary)}
            truth = {"out": apply_rotary(x.double(), *rotary.double())}
        assert assert_strays_at_most_twice_as_far(*named, truth, epsilon(kind)) == {"out"}
    for units in (5632, 1100):
        gate, up = random(T, 2 * units, dtype=kind).chunk(2, dim=-1)
        with torch.no_grad():
            actual = {"out": silu_product(gate, up)}
        plain, truth = ({"out": torch.nn.functional.silu(a) * b} for a, b in ((gate, up), (gate.double(), up.double())))
        assert assert_strays_at_most_twice_as_far(actual, plain, truth, epsilon(kind)) == {"out"}
    for numbers in (2048, 1100, 576):
        x, change = random(2, T, numbers, dtype=kind)
        weight = random(numbers, dtype=kind)
        with torch.no_grad():
            actual = dict(zip(("sum", "out"), add_norm(x, change, weight, 1e-5), strict=True))
        plain, truth = (
            normed_sum(*tensors) for tensors in ((x, change, weight), (x.double(), change.double(), weight.double()))
        )
        assert assert_strays_at_most_twice_as_far(actual, plain, truth, epsilon(kind)) == {"sum", "out"}


def normed_sum(x: Tensor, change: Tensor, weight: Tensor) -> dict[str, Tensor]:
    total = x + change
    return {"sum": total, "out": torch.nn.functional.rms_norm(total, weight.shape, weight, 1e-5)}
