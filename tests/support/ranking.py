"""A kernel of the ranking alone, without what it ranks."""

import triton
import triton.language as tl
from nsa_kernels.block_selection import best_of_groups

# M candidates, N of them chosen.


@triton.jit
def best_kernel(
    bits_ptr,  # int32 [M]
    indices_ptr,  # int32 [N]
    M, N: tl.constexpr, CANDIDATES: tl.constexpr, SLOTS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One program chooses among all candidates."""
    i = tl.arange(0, CANDIDATES)
    i, _, chosen, place = best_of_groups(tl.load(bits_ptr + i, mask=i < M, other=-1), N, SLOTS, GROUPS)
    tl.store(indices_ptr + place, i, mask=chosen)
