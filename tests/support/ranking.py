"""A kernel of the ranking alone, without what it ranks."""

import triton
import triton.language as tl
from nsa_kernels.block_selection import best_soon

# M candidates, N of them chosen.


@triton.jit
def best_kernel(
    bits_ptr,  # int32 [M]
    indices_ptr,  # int32 [N]
    M, N: tl.constexpr, CANDIDATES: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """One program chooses among all candidates."""
    i = tl.arange(0, CANDIDATES)
    chosen, place = best_soon(tl.load(bits_ptr + i, mask=i < M, other=-1), N, PROBES)
    tl.store(indices_ptr + place, i, mask=chosen)
