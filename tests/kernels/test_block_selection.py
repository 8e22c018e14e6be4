"""The ranking of one row of candidates, alone: every size of row, and rows that are hard to bisect."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
block_selection = pytest.importorskip("nsa_kernels.triton.block_selection", exc_type=ImportError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")

best, FORCED = block_selection.best, block_selection.FORCED.value
ROWS = {
    "random": torch.rand,
    "few values": lambda size: torch.rand(size).mul(4).floor() / 4,
    "zeros": torch.zeros,
    "ascending": lambda size: torch.rand(size).sort().values,
}


@triton.jit
def _best_kernel(bits_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, M)
    chosen, place = best(tl.load(bits_ptr + i), N)
    tl.store(out_ptr + place, i, mask=chosen)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(("size", "n"), [(16, 1), (16, 16), (128, 16), (256, 3), (256, 100), (1024, 16), (1024, 64)])
def test_the_largest_are_chosen_and_of_equal_ones_the_first(name, size, n):
    torch.manual_seed(size + n)
    bits = ROWS[name](size).view(torch.int32)
    bits[torch.randperm(size)[: (size - n) // 3]] = -1
    bits[[0, -1]] = FORCED
    chosen = torch.full((n,), -1, dtype=torch.int32)
    _best_kernel[(1,)](bits, chosen, size, n)
    expected = bits.sort(descending=True, stable=True).indices[:n].sort().values
    assert chosen.tolist() == expected.tolist()
