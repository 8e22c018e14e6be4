"""Next-token losses that never hold the logits of a whole sequence.

    loss = sum over the scored tokens of -log softmax(hidden @ weight.T)[target]

Products are taken in the dtype of computation; log-sum-exp, losses and every sum over tokens, that of the weight's
gradient too, in float32. `F.linear_cross_entropy` of torch 2.13 sums in the dtype of its input: with bfloat16 the loss
is off by up to a nat a token.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS, CPU_CHUNK_LOGITS = 2**27, 2**22
"""Logits that are held at once: enough to fill a GPU, few enough for the caches of a CPU."""

_Walk = Callable[..., tuple[Tensor, Tensor]]
"""From the logits of a chunk of tokens, and more of each token, to their summed loss and its gradient in the logits."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the targets that are not ignored, in nats.

    Its graph can be walked backward once.

    Args:
        hidden: final hidden states, [T, hidden_size]; under autocast they are cast to its dtype.
        weight: output embedding, [vocab_size, hidden_size]; cast to the dtype of `hidden`.
        targets: int64 [T].
        ignore_index: the target that is not scored.

    Returns:
        A float32 scalar; 0 where every target is ignored.
    """
    dtype = _compute_dtype(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return chunked_cross_entropy(hidden, weight, targets, ignore_index, dtype)


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype | None = None
) -> Tensor:
    """`summed_cross_entropy` with products in `dtype`, that of `hidden` if not given, whatever autocast says."""
    dtype = dtype or hidden.dtype
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return token_cross_entropy(hidden.to(dtype), weight, targets, ignore_index).sum()
    walk = _walk(_loss_and_gradient, hidden)
    return _summed(hidden, weight, dtype, lambda logits, y: walk(logits, y, ignore_index), targets)


def summed_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, compared: Tensor
) -> Tensor:
    """Sum of KL(teacher || model) over the next tokens' distributions, in nats; no gradient reaches the teacher.

    Args:
        hidden: the model's final hidden states, [T, hidden_size]; cast as in `summed_cross_entropy`.
        weight: its output embedding, [vocab_size, hidden_size].
        teacher_hidden: the teacher's, [T, its hidden_size].
        teacher_weight: the teacher's, [vocab_size, its hidden_size].
        compared: bool [T], the tokens whose predictions are compared.

    Returns:
        A float32 scalar; 0 where no token is compared.
    """
    dtype, teacher_dtype = _compute_dtype(hidden), _compute_dtype(teacher_hidden)
    teacher_hidden = teacher_hidden.detach().to(teacher_dtype)
    teacher_weight = teacher_weight.detach().to(teacher_dtype)
    walk = _walk(_divergence_and_gradient, hidden)

    def compare(logits: Tensor, teacher_hidden: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
        return walk(logits, teacher_hidden @ teacher_weight.T, compared)

    return _summed(hidden, weight, dtype, compare, teacher_hidden, compared)


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Loss of every token in nats, float32 [T], 0 where the target is ignored; arguments as `summed_cross_entropy`."""
    chunk, weight = _chunk_tokens(weight), weight.to(hidden.dtype)
    losses = [
        F.cross_entropy((h @ weight.T).float(), y, ignore_index=ignore_index, reduction="none")
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(losses)


def _summed(hidden: Tensor, weight: Tensor, dtype: torch.dtype, walk: _Walk, *rows: Tensor) -> Tensor:
    """What `walk` returns for each chunk of tokens and their `rows`, summed; products are in `dtype`."""
    with torch.autocast(hidden.device.type, enabled=False):
        return cast("Tensor", _ChunkedLoss.apply(hidden, weight, dtype, walk, *rows))


class _ChunkedLoss(torch.autograd.Function):
    """The gradients are computed along with the loss: logits are needed once, and those of one chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype, walk: _Walk, *rows: Tensor) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=_wide(dtype))
        chunk = _chunk_tokens(weight)
        for h, grad_h, *row in zip(*(x.split(chunk) for x in (hidden, grad_hidden, *rows)), strict=True):
            nats, gradient = walk(h @ weight.T, *row)
            loss += nats
            torch.mm(gradient, weight, out=grad_h)
            _add_product(grad_weight, gradient.T, h)
            del gradient  # before the next chunk's logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (x.mul_(grad).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return (*scaled, *(None for _ in ctx.needs_input_grad[2:]))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right in the dtype of `total`, which may be wider than theirs."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


def _loss_and_gradient(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its gradient in the logits [T, vocab_size], in their dtype; uses the logits up."""
    scored = targets != ignore_index
    targets, wide = targets.where(scored, 0), logits.to(_wide(logits.dtype))
    shifted = wide.sub_(wide.amax(-1, keepdim=True))
    chosen = shifted.gather(1, targets[:, None])
    likely = shifted.exp_()
    total = likely.sum(-1, keepdim=True)
    loss = (total.log() - chosen).squeeze(1).where(scored, 0.0).sum()
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = likely.div_(total).sub_(is_target.to(wide.dtype)).masked_fill_(~scored[:, None], 0.0)
    return loss, gradient.to(logits.dtype)


def _divergence_and_gradient(logits: Tensor, teacher_logits: Tensor, compared: Tensor) -> tuple[Tensor, Tensor]:
    """Summed divergence of a chunk and its gradient in the logits [T, vocab_size], in their dtype."""
    own, teacher = (x.to(_wide(x.dtype)).log_softmax(-1) for x in (logits, teacher_logits))
    likely = teacher.exp()
    divergence = (likely * (teacher - own)).sum(-1).where(compared, 0.0).sum()
    gradient = (own.exp() - likely).masked_fill(~compared[:, None], 0.0)
    return divergence, gradient.to(logits.dtype)


def _walk(walk: _Walk, hidden: Tensor) -> _Walk:
    return fused_walk(walk) if hidden.is_cuda else walk


@functools.cache
def fused_walk(walk: _Walk) -> _Walk:
    """A walk for a GPU: two passes over the logits instead of a dozen."""
    return torch.compile(walk)


def _chunk_tokens(weight: Tensor) -> int:
    return max(1, (CHUNK_LOGITS if weight.is_cuda else CPU_CHUNK_LOGITS) // len(weight))


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Of the products: autocast's where it is on, for the norm before it leaves float32."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over values in `dtype`: float32, unless they are wider."""
    return dtype if dtype == torch.float64 else torch.float32
