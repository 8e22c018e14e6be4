"""Rotary embedding, gated product and the norm of a sum, each number read and written once."""

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.primitives import ceil_div, padded, wide

# T tokens, N numbers of a token, H heads, D head dim, 2 * HALF rotated dimensions of a head, I hidden units.


@triton.jit
def turn(x, partner, column, cos_ptr, sin_ptr, HALF: tl.constexpr):
    """Rotate heads: column i < 2 * HALF by the angle of i % HALF, its partner being i + HALF or i - HALF."""
    rotated = column < 2 * HALF
    cos = tl.load(cos_ptr + column % HALF, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + column % HALF, mask=rotated, other=0.0).to(tl.float32)
    return x * cos + tl.where(column < HALF, -partner, partner) * sin


@triton.jit
def rotate_heads(source_ptr, target_ptr, cos_ptr, sin_ptr, column, mask, HALF: tl.constexpr):
    """Copy the columns of heads that the mask leaves, rotated; the pointers are those of a head or [heads, 1]."""
    x = tl.load(source_ptr + column, mask=mask, other=0.0).to(tl.float32)
    other = tl.where(column < HALF, column + HALF, column - HALF)
    partner = tl.load(source_ptr + other, mask=mask & (column < 2 * HALF), other=0.0).to(tl.float32)
    turned = turn(x, partner, column, cos_ptr, sin_ptr, HALF)
    tl.store(target_ptr + column, turned.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_kernel(
    x_ptr, out_ptr,  # [T, H, D], tokens of x being `x_stride` apart
    cos_ptr, sin_ptr,  # [T, HALF]
    num_rows, x_stride,
    H: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program rotates ROWS heads, of one token or of neighbours."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    token, head, column = (row // H).to(tl.int64), row % H, tl.arange(0, BLOCK_D)[None, :]
    mask = (row < num_rows) & (column < D)
    source, target = x_ptr + token * x_stride + head * D, out_ptr + row.to(tl.int64) * D
    rotate_heads(source, target, cos_ptr + token * HALF, sin_ptr + token * HALF, column, mask, HALF)


@triton.jit
def _silu_product_kernel(
    gate_ptr, up_ptr,  # [T, I], tokens being `gate_stride` and `up_stride` apart
    out_ptr,  # [T, I]
    num_units, gate_stride, up_stride, BLOCK_I: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_I hidden units of one token."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    token, unit = wide(tl.program_id(0)), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = unit < num_units
    gate = tl.load(gate_ptr + token * gate_stride + unit, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * up_stride + unit, mask=mask, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * num_units + unit, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_norm_kernel(
    x_ptr, change_ptr,  # [T, N], tokens being `x_stride` and `change_stride` apart
    weight_ptr,  # [N]
    sum_ptr, out_ptr,  # [T, N]
    N, x_stride, change_stride, eps, BLOCK_N: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program takes one token; the sum is normed as it is stored."""
    token, column = wide(tl.program_id(0)), tl.arange(0, BLOCK_N)
    mask = column < N
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    change = tl.load(change_ptr + token * change_stride + column, mask=mask, other=0.0).to(tl.float32)
    total = (x + change).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + token * N + column, total, mask=mask)
    total = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(total * total, 0) / N + eps)
    tl.store(out_ptr + token * N + column, (total * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def launch_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`elementwise.rotate` of x [T, H, D]."""
    x = whole_rows(x)
    (T, H, D), out, (early, overlap) = x.shape, x.new_empty(x.shape), early_start(x.device)
    rows = max(1, _TILE // padded(D))
    _rotate_kernel[(ceil_div(T * H, rows),)](
        x, out, cos.contiguous(), sin.contiguous(), T * H, x.stride(0), H, cos.shape[1], D, padded(D), rows,
        early, **overlap,
    )  # fmt: skip
    return out


def launch_silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`elementwise.silu_product` of [T, I] each."""
    gate, up = whole_rows(gate), whole_rows(up)
    (T, num_units), out, (early, overlap) = gate.shape, gate.new_empty(gate.shape), early_start(gate.device)
    grid = T, ceil_div(num_units, _UNITS)
    _silu_product_kernel[grid](gate, up, out, num_units, gate.stride(0), up.stride(0), _UNITS, early, **overlap)
    return out


def launch_add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`elementwise.add_norm` of [T, N] each."""
    x, change = whole_rows(x), whole_rows(change)
    (T, N), total, out, (early, overlap) = x.shape, x.new_empty(x.shape), x.new_empty(x.shape), early_start(x.device)
    _add_norm_kernel[(T,)](
        x, change, weight.contiguous(), total, out, N, x.stride(0), change.stride(0), eps, padded(N), early,
        num_warps=min(max(padded(N) // _NUMBERS_A_WARP, 1), 16), **overlap,
    )  # fmt: skip
    return total, out


def whole_rows(x: Tensor) -> Tensor:
    """[T, N] or [T, H, D] with the numbers of a token in a row; tokens may be further apart, as in a wider tensor."""
    return x if x.stride()[1:] == (*x.shape[2:], 1) else x.contiguous()


_TILE = 2048
"""Numbers that a program rotates."""
_UNITS = 1024
"""Hidden units that a program multiplies."""
_NUMBERS_A_WARP = 512
"""Of a token's numbers, those that a warp norms."""
