"""Stage 1: summarise each block of keys or values in one (arXiv:2502.11089, eq. 7).

    out[i] = φ(x[i·d], …, x[i·d + l - 1]),   φ(x) = mean(x) + f(x + e)

The mean is a kernel. A learned f is a matmul over the flattened blocks, which overlap: they are gathered for it and
gathered again in backward, so that nothing larger than x is kept. f(x + e) is computed as x · W + (e · W + b).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.packing import BatchLayout
from nsa_kernels.precision import linear_map, without_autocast
from nsa_kernels.triton.primitives import ceil_div, padded, store_rows

# T packed tokens, C rows of compressed blocks, H KV heads, D head dim, l tokens in a compression block, d its stride.


@triton.jit
def _mean_kernel(
    x_ptr,  # [T, WIDTH]
    summary_start_ptr,  # [C]
    out_ptr,  # [C, WIDTH]
    num_tokens,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program averages COLUMNS of the H * D columns of one block; an unused row gets zeros."""
    c = tl.program_id(0).to(tl.int64)
    start = tl.load(summary_start_ptr + c)
    token, column = tl.arange(0, TOKENS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (token < BLOCK_SIZE)[:, None] & (start < num_tokens) & (column < WIDTH)[None, :]
    rows = (start + token).to(tl.int64)
    x = tl.load(x_ptr + rows[:, None] * WIDTH + column[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / BLOCK_SIZE
    tl.store(out_ptr + c * WIDTH + column, mean.to(out_ptr.dtype.element_ty), mask=column < WIDTH)


@triton.jit
def _gather_kernel(
    x_ptr,  # [T, H, D]
    summary_start_ptr,  # [C]
    kept_ptr,  # [H, C], which blocks are copied; all if None
    out_ptr,  # [H, C, l * D]
    num_tokens, num_rows,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """One program copies one block of one head; an unused row gets zeros, and so does one that is not kept."""
    c, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(summary_start_ptr + c)
    if kept_ptr is not None:
        start = tl.where(tl.load(kept_ptr + head.to(tl.int64) * num_rows + c) != 0, start, num_tokens)
    token, column = tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    inside = (token < BLOCK_SIZE)[:, None] & (column < D)[None, :]
    rows = (start + token).to(tl.int64) * H + head
    x = tl.load(x_ptr + rows[:, None] * D + column[None, :], mask=inside & (start < num_tokens), other=0.0)
    out = out_ptr + (head.to(tl.int64) * num_rows + c) * (BLOCK_SIZE * D)
    tl.store(out + token[:, None] * D + column[None, :], x, mask=inside)


@triton.jit
def _scatter_kernel(
    grad_ptr,  # [C, H, D] of the mean, or [H, C, l * D] of gathered blocks
    document_start_ptr, first_summary_ptr, document_end_ptr,  # [T]
    out_ptr,  # [T, H, D]
    num_tokens, num_rows,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """One program sums, for a tile of tokens of one head, the gradients of the blocks that cover each token."""
    head = tl.program_id(1)
    token, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK_D)
    exists = token < num_tokens
    document_start = tl.load(document_start_ptr + token, mask=exists, other=0)
    length = tl.load(document_end_ptr + token, mask=exists, other=0) - document_start
    first_summary = tl.load(first_summary_ptr + token, mask=exists, other=0)
    position = token - document_start
    blocks = tl.where(length >= BLOCK_SIZE, (length - BLOCK_SIZE) // STRIDE + 1, 0)
    total = tl.zeros([TOKENS, BLOCK_D], tl.float32)
    for back in tl.static_range(0, BLOCK_SIZE // STRIDE):
        i = position // STRIDE - back
        covered = exists & (i >= 0) & (i < blocks)
        row = (first_summary + i).to(tl.int64)
        if MEAN:
            source = (row * H + head) * D
        else:
            source = (head.to(tl.int64) * num_rows + row) * (BLOCK_SIZE * D) + (position - i * STRIDE) * D
        mask = covered[:, None] & (column < D)[None, :]
        total += tl.load(grad_ptr + source[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if MEAN:
        total /= BLOCK_SIZE
    store_rows(out_ptr, token.to(tl.int64) * H + head, exists, total, D, BLOCK_D)


def _scatter(grad: Tensor, head_dim: int, layout: list[Tensor], block_size: int, stride: int, *, mean: bool) -> Tensor:
    """Gradient of the tokens, [T, H, D], from that of means [C, H, D] or of gathered blocks [H, C, l * D]."""
    where, tokens = BatchLayout(*layout), 32
    T, H, D = len(where.document_start), grad.shape[1 if mean else 0], head_dim
    out = grad.new_empty(T, H, D)
    _scatter_kernel[(ceil_div(T, tokens), H)](
        grad, where.document_start, where.first_summary, where.document_end, out, T, len(where.summary_start),
        H, D, padded(D), block_size, stride, tokens, mean,
    )  # fmt: skip
    return out


def _gather(x: Tensor, layout: list[Tensor], block_size: int, kept: Tensor | None = None) -> Tensor:
    """The blocks of each head, flattened token by token, [H, C, l * D]; zeros where `kept` [H, C] is 0."""
    T, H, D = x.shape
    start = BatchLayout(*layout).summary_start
    out = x.new_empty(H, len(start), block_size * D)
    _gather_kernel[(len(start), H)](x, start, kept, out, T, len(start), H, D, padded(D), block_size, padded(block_size))
    return out


@torch.library.custom_op("nsa_kernels::block_mean", mutates_args=())
def block_mean(x: Tensor, layout: list[Tensor], block_size: int, stride: int) -> Tensor:
    """Mean of each compression block, x [T, H, D] -> [C, H, D] in x's dtype; zeros in unused rows."""
    T, H, D = x.shape
    start = BatchLayout(*layout).summary_start
    out = x.new_empty(len(start), H, D)
    tokens = padded(block_size)
    columns = min(padded(H * D), _WARP_BYTES // x.element_size())
    _mean_kernel[(len(start), ceil_div(H * D, columns))](
        x, start, out, T, H * D, columns, block_size, tokens, num_warps=min(max(1, tokens // _WARP_TOKENS), 8)
    )
    return out


@block_mean.register_fake
def _(x: Tensor, layout: list[Tensor], block_size: int, stride: int) -> Tensor:
    return x.new_empty(BatchLayout(*layout).summary_start.shape[0], *x.shape[1:])


@torch.library.custom_op("nsa_kernels::block_mean_backward", mutates_args=())
def _block_mean_backward(grad: Tensor, layout: list[Tensor], block_size: int, stride: int) -> Tensor:
    return _scatter(grad.contiguous(), grad.shape[-1], layout, block_size, stride, mean=True)


@_block_mean_backward.register_fake
def _(grad: Tensor, layout: list[Tensor], block_size: int, stride: int) -> Tensor:
    return grad.new_empty(BatchLayout(*layout).document_start.shape[0], *grad.shape[1:])


@torch.library.custom_op("nsa_kernels::block_linear", mutates_args=())
def block_linear(x: Tensor, weight: Tensor, layout: list[Tensor], block_size: int, stride: int) -> Tensor:
    """Each flattened block times its head's matrix: x [T, H, D], weight [H, l * D, M] -> [H, C, M]."""
    with without_autocast(x):
        return torch.bmm(_gather(x, layout, block_size), weight)


@block_linear.register_fake
def _(x: Tensor, weight: Tensor, layout: list[Tensor], block_size: int, stride: int) -> Tensor:
    return x.new_empty(x.shape[1], BatchLayout(*layout).summary_start.shape[0], weight.shape[-1])


@torch.library.custom_op("nsa_kernels::block_linear_backward", mutates_args=())
def _block_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, layout: list[Tensor], block_size: int, stride: int
) -> tuple[Tensor, Tensor]:
    kept = (grad != 0).any(-1).int()  # what has no gradient gives none, not even 0 times infinity
    with without_autocast(x):
        grad_weight = torch.bmm(_gather(x, layout, block_size, kept).mT, grad)
        grad_blocks = torch.bmm(grad, weight.mT)  # [H, C, l * D]
    return _scatter(grad_blocks, x.shape[-1], layout, block_size, stride, mean=False), grad_weight


@_block_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, layout: list[Tensor], block_size: int, stride: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, layout, ctx.block_size, ctx.stride = inputs
    ctx.save_for_backward(*layout)


def _mean_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    layout = list(ctx.saved_tensors)
    return _block_mean_backward(grad, layout, ctx.block_size, ctx.stride), [None] * len(layout), None, None


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, layout, ctx.block_size, ctx.stride = inputs
    ctx.save_for_backward(x, weight, *layout)


def _linear_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *layout = ctx.saved_tensors
    grads = _block_linear_backward(grad, x, weight, layout, ctx.block_size, ctx.stride)
    return *grads, [None] * len(layout), None, None


block_mean.register_autograd(_mean_gradients, setup_context=_save_mean)
block_linear.register_autograd(_linear_gradients, setup_context=_save_linear)


def compress(x: Tensor, config: NSAConfig, weights: CompressionWeights | None, layout: BatchLayout) -> Tensor:
    """Summarise each block of keys or values: φ(x) = mean(x) + f(x + e).

    Args:
        x: keys before rotary embedding, or values, [T, H_kv, D].
        config: block sizes.
        weights: the parameters of φ; None for the mean.
        layout: `batch_layout` of the batch.

    Returns:
        [C, H_kv, D] in x's dtype: document after document, block after block, then zeros.

    Source: arXiv:2502.11089, eq. 7.
    """
    config = config if weights is not None else config.within(x.shape[0])
    x, tensors = x.contiguous(), list(layout)
    sizes = (config.compress_block_size, config.compress_stride)
    summary = block_mean(x, tensors, *sizes)
    if weights is None:
        return summary
    weight, e = weights.in_weight.to(x.dtype), weights.position_embedding.flatten(1).unsqueeze(1)  # [H_kv, 1, l * D]
    bias = linear_map(e, weights.in_weight) + weights.in_bias.unsqueeze(1)  # [H_kv, 1, M]
    mapped = block_linear(x, weight, tensors, *sizes) + bias.to(x.dtype)  # [H_kv, C, M]
    if weights.out_weight is not None and weights.out_bias is not None:
        mapped = linear_map(mapped, weights.out_weight.to(x.dtype), activated=True)  # [H_kv, C, D]
        mapped = mapped + weights.out_bias.to(x.dtype).unsqueeze(1)
    used = (layout.summary_start < len(x))[:, None, None]
    return (summary + mapped.transpose(0, 1)).where(used, 0.0)


_WARP_BYTES, _WARP_TOKENS = 512, 32
"""What a warp of the mean holds: so many tokens, and of each as many bytes as its lanes load at once, for then a lane
sums columns of its own."""
