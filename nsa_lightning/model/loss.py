"""Next-token cross-entropy that never holds the logits of a whole sequence."""

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
    if torch.is_autocast_enabled(hidden.device.type):  # the norm before it leaves float32
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    weight = weight.to(hidden.dtype)
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
