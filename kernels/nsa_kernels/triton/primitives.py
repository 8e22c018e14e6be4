"""Triton helpers that the stages share: rows of a tile, tensor descriptors, softmax arithmetic.

A tile holds the queries of `QUERIES` neighbouring tokens under all G heads of one KV head, one row for each token and
head, so that a key is read once for the whole group. Scores are kept in units of log2: exp2 is what the hardware has.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv, D head dim. ROWS >= QUERIES * G rows in a tile.

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1.0e37)
"""Product with a key that a query does not see."""
LOWEST = tl.constexpr(-1.0e30)
"""Start of a running maximum: far above any scaled HIDDEN, so that a hidden key weighs 0."""


@triton.jit
def tile_rows(first_token, num_tokens, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr):
    """Token, head in its group and existence of each row of a tile; rows that do not exist repeat one that does."""
    row = tl.arange(0, ROWS)
    token = first_token + tl.minimum(row // GROUP, QUERIES - 1)
    exists = (row < QUERIES * GROUP) & (token < num_tokens)
    return tl.minimum(token, num_tokens - 1), row % GROUP, exists


@triton.jit
def wide(x):
    """An int64 of a kernel's integer argument, which Triton may have made a constant."""
    return tl.zeros([], tl.int64) + x


@triton.jit
def row_addresses(token, head, H: tl.constexpr):
    """Index of row (token, head) in a [T, H, ...] tensor, int64."""
    return token.to(tl.int64) * H + head


@triton.jit
def load_rows(ptr, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [len(rows), BLOCK_D] of a contiguous [..., D] tensor, zeros past column D."""
    column = tl.arange(0, BLOCK_D)
    addresses = ptr + rows[:, None] * D + column[None, :]
    if D == BLOCK_D:
        return tl.load(addresses)
    return tl.load(addresses, mask=column[None, :] < D, other=0.0)


@triton.jit
def store_rows(ptr, rows, exists, value, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows of `value` [len(rows), BLOCK_D] that exist to a contiguous [..., D] tensor in its dtype."""
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (column[None, :] < D)
    tl.store(ptr + rows[:, None] * D + column[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_block(descriptor, first_row, head, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [first_row, first_row + ROWS) of one head of a [rows, heads, D] tensor, zeros outside of it."""
    return descriptor.load([first_row, head, 0]).reshape(ROWS, BLOCK_D)


@triton.jit
def finite_part(x):
    """x [N, D] with zeros for infinity and NaN, and which rows held one: 0 times it would reach those that see no x."""
    finite = x - x == 0
    return tl.where(finite, x, 0.0).to(x.dtype), tl.min(finite.to(tl.int32), 1) == 0


@triton.jit
def spoil(x, seen, spoilt):
    """x [M, D] with NaN in the rows that see [M, N] one of the spoilt [N]."""
    sees_one = tl.max((seen & spoilt[None, :]).to(tl.int32), 1) != 0
    return x + tl.where(sees_one, float("nan"), 0.0)[:, None]  # a choice of x itself fails to compile for Blackwell


@triton.jit
def softmax_step(products, v, scale_log2, row_max, row_sum, acc, PRECISION: tl.constexpr):
    """Add the keys of one block to a running softmax: products q · k [M, N], v [N, D]."""
    new_max = tl.maximum(row_max, tl.max(products, 1) * scale_log2)
    p = tl.exp2(products * scale_log2 - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return new_max, row_sum * shrink + tl.sum(p, 1), acc


@triton.jit
def softmax_end(row_max, row_sum, acc):
    """o and natural-log lse of a finished running softmax; a row that saw no key has 0 and 0."""
    seen = row_sum > 0
    o = acc / tl.where(seen, row_sum, 1.0)[:, None]
    return o, tl.where(seen, (row_max + tl.log2(row_sum)) * LN_2, 0.0)


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton runs its kernels in Python (TRITON_INTERPRET=1), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 inputs follow `torch.set_float32_matmul_precision`, as matmuls do."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def block_descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Reads blocks of `rows` rows of one head of x [rows, heads, D] with all columns, padded to a power of two."""
    if x.data_ptr() % 16:  # as the copy engine wants it
        x = x.clone()
    return TensorDescriptor.from_tensor(x, [rows, 1, padded(x.shape[-1])])


def padded(size: int) -> int:
    """The power of two, at least 16, that a tile needs for `size` rows or columns."""
    return max(16, power_of_two(size))


def power_of_two(size: int) -> int:
    """The next power of two from `size`, at least 1, on. Triton's own function takes 3 us; a layer asks 60 times."""
    return 1 << (size - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up; see `power_of_two`."""
    return -(-a // b)
