"""Next-token losses that never hold the logits of a whole sequence."""

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**27
"""Logits that are held at once where torch has no fused loss."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Sum of -log softmax(hidden @ weight.T)[target] over the targets that are not ignored, in nats.

    Args:
        hidden: final hidden states, [T, hidden_size]; under autocast they are cast to its dtype.
        weight: output embedding, [vocab_size, hidden_size]; cast to the dtype of `hidden`.
        targets: int64 [T].
        ignore_index: the target that is not scored.

    Returns:
        A float32 scalar; 0 where every target is ignored.
    """
    hidden, weight = _as_computed(hidden, weight)
    with torch.autocast(hidden.device.type, enabled=False):
        if not hasattr(F, "linear_cross_entropy"):  # before torch 2.13
            return chunked_cross_entropy(hidden, weight, targets, ignore_index)
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(
            hidden, weight, targets, ignore_index=ignore_index, reduction="sum", options=options
        ).float()


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`summed_cross_entropy` for torch without a fused one; its graph can be walked backward once."""
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return token_cross_entropy(hidden, weight, targets, ignore_index).sum()
    return cast("Tensor", _ChunkedCrossEntropy.apply(hidden, weight, targets, ignore_index))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are computed along with the loss: logits are needed once, and those of one chunk at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        walk = fused_walk() if hidden.is_cuda else _loss_and_gradient
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        chunk = max(1, _CHUNK_LOGITS // len(weight))
        for h, y, grad_h in zip(hidden.split(chunk), targets.split(chunk), grad_hidden.split(chunk), strict=True):
            nats, gradient = walk(h @ weight.T, y, ignore_index)
            loss += nats
            torch.mm(gradient, weight, out=grad_h)
            grad_weight.addmm_(gradient.T, h)
            del gradient  # before the next chunk's logits
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(grad), grad_weight.mul_(grad), None, None


def _loss_and_gradient(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its gradient in the logits [T, vocab_size], in their dtype; uses the logits up."""
    scored = targets != ignore_index
    targets, logits_32 = targets.where(scored, 0), logits.float()
    lse = logits_32.logsumexp(-1, keepdim=True)
    loss = (lse - logits_32.gather(1, targets[:, None])).squeeze(1).where(scored, 0.0).sum()
    chosen = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = logits_32.sub_(lse).exp_().sub_(chosen.float()).masked_fill_(~scored[:, None], 0.0)
    return loss, gradient.to(logits.dtype)


@functools.cache
def fused_walk() -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """`_loss_and_gradient` for a GPU: two passes over the logits instead of a dozen."""
    return torch.compile(_loss_and_gradient)


def summed_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, compared: Tensor
) -> Tensor:
    """Sum of KL(teacher || model) over the next tokens' distributions, in nats; logits of one chunk at a time.

    Args:
        hidden: the model's final hidden states, [T, hidden_size]; cast as in `summed_cross_entropy`.
        weight: its output embedding, [vocab_size, hidden_size].
        teacher_hidden: the teacher's, [T, its hidden_size].
        teacher_weight: the teacher's, [vocab_size, its hidden_size].
        compared: bool [T], the tokens whose predictions are compared.

    Returns:
        A float32 scalar; 0 where no token is compared.
    """

    def chunk_divergence(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, compared: Tensor) -> Tensor:
        own = (hidden @ weight.T).float().log_softmax(-1)
        teacher = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
        return (teacher.exp() * (teacher - own)).sum(-1).where(compared, 0.0).sum()

    hidden, weight = _as_computed(hidden, weight)
    teacher_hidden, teacher_weight = _as_computed(teacher_hidden, teacher_weight)
    chunk = max(1, _CHUNK_LOGITS // len(weight))
    parts = [
        checkpoint(chunk_divergence, h, weight, t, c, use_reentrant=False, preserve_rng_state=False)
        for h, t, c in zip(hidden.split(chunk), teacher_hidden.split(chunk), compared.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Loss of every token in nats, float32 [T], 0 where the target is ignored; arguments as `summed_cross_entropy`."""
    chunk = max(1, _CHUNK_LOGITS // len(weight))
    weight = weight.to(hidden.dtype)
    losses = [
        F.cross_entropy((h @ weight.T).float(), y, ignore_index=ignore_index, reduction="none")
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.cat(losses)


def _as_computed(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the product: autocast's where it is on, for the norm before it leaves float32."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, weight.to(hidden.dtype)
