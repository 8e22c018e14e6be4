"""Next-token losses that never hold the logits of a whole sequence."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**25
"""Logits that the fallback holds at once."""


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
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13 or newer
        options = torch.nn.LinearCrossEntropyOptions()
        with torch.autocast(hidden.device.type, enabled=False):
            loss = F.linear_cross_entropy(
                hidden, weight, targets, ignore_index=ignore_index, reduction="sum", options=options
            )
        return loss.float()
    return chunked_cross_entropy(hidden, weight, targets, ignore_index)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """`summed_cross_entropy` for torch without a fused one: logits of one chunk at a time, recomputed in backward."""

    def chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ weight.T).float()
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")

    chunk = max(1, _CHUNK_LOGITS // len(weight))
    losses = [
        checkpoint(chunk_loss, h, weight, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack(losses).sum()


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
