"""Softmax attention of independent problems, forward and backward.

Infinity and NaN reach those that see them and no others. A matrix product does not know who sees what, and 0 times
infinity is NaN: such numbers are taken out of it, and NaN is put where they belong.
"""

import torch
from torch import Tensor

# B problems of M query rows and N keys each, D head dim.


def masked_scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """q @ k of scaled queries, [B, M, N], -inf where `hidden` (broadcast) is True."""
    return torch.bmm(q, k.mT).masked_fill_(hidden, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, watchful: bool | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention: q [B, M, D], k [B, N, D], v [B, N, D_v] -> o [B, M, D_v], lse [B, M]; no key gives 0, 0.

    `watchful` says whether v may hold infinity or NaN, where the caller has looked.
    """
    scores = masked_scores(q, k, hidden)
    row_max = scores.amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == float("-inf"), 0.0)
    p = scores.sub_(row_max).exp_()
    row_sum = p.sum(-1, keepdim=True)
    seen = row_sum != 0
    watchful = may_be_infinite(v) if watchful is None else watchful
    o = torch.bmm(p, without(v, v.isfinite()) if watchful else v).div_(row_sum.masked_fill(~seen, 1.0))
    if watchful:
        spoilt = ~(hidden | v.isfinite().all(-1).unsqueeze(1))
        o.masked_fill_(spoilt.any(-1, keepdim=True), float("nan"))
    lse = torch.where(seen, row_max + row_sum.log(), 0.0)
    return o, lse.squeeze(-1)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, lse: Tensor, delta: Tensor, grad_o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the saved lse [B, M, 1] and delta = sum(o * grad_o) [B, M, 1]."""
    p = masked_scores(q, k, hidden).sub_(lse).exp_()
    grad_v = torch.bmm(p.mT, grad_o)
    grad_scores = torch.bmm(grad_o, v.mT).sub_(delta).mul_(p)
    return torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q), grad_v


def attend_backward_of_finite_pairs(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, lse: Tensor, delta: Tensor, grad_o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`attend_backward` where some numbers are not finite; a row without a gradient gives none."""
    active = (grad_o != 0).any(-1, keepdim=True)  # [B, M, 1]
    weighs = q.isfinite().all(-1, keepdim=True) & lse.isfinite() & grad_o.isfinite().all(-1, keepdim=True)
    scored = weighs & delta.isfinite()
    known, key = k.isfinite().all(-1).unsqueeze(1), v.isfinite().all(-1).unsqueeze(1)  # [B, 1, N]
    seen = ~hidden & active
    spoilt_p, spoilt_scores = seen & ~(weighs & known), seen & ~(scored & known & key)  # [B, M, N]
    q, k, v, grad_o = (without(x, x.isfinite()) for x in (q, k, v, grad_o))
    p = masked_scores(q, k, hidden).sub_(without(lse, lse.isfinite())).exp_()
    p.masked_fill_(hidden | ~(active & weighs) | ~known, 0.0)
    grad_v = torch.bmm(p.mT, grad_o)
    p.masked_fill_(~(scored & key), 0.0)
    grad_scores = torch.bmm(grad_o, v.mT).sub_(without(delta, delta.isfinite())).mul_(p)
    nan, queries, keys = float("nan"), spoilt_scores.any(-1, keepdim=True), spoilt_scores.any(1).unsqueeze(-1)
    return (
        torch.bmm(grad_scores, k).masked_fill_(queries, nan),
        torch.bmm(grad_scores.mT, q).masked_fill_(keys, nan),
        grad_v.masked_fill_(spoilt_p.any(1).unsqueeze(-1), nan),
    )


def may_be_infinite(x: Tensor) -> bool:
    """Whether to look for infinity and NaN: a CPU knows by the sum, for another device the host would wait."""
    return x.device.type != "cpu" or not bool(x.sum().isfinite())


def without(x: Tensor, finite: Tensor) -> Tensor:
    """x with zeros where it is not finite."""
    return x.where(finite, 0.0)
