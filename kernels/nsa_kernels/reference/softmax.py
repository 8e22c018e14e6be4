"""Softmax attention of one query at a time."""

import torch
from torch import Tensor

from nsa_kernels.errors import SettingError
from nsa_kernels.precision import contract

# H query heads, H_kv key/value heads, G = H / H_kv heads in a group, D head dimension, S keys that one query sees.


def group_size_of(num_heads: int, num_kv_heads: int) -> int:
    """G = H / H_kv."""
    if num_heads % num_kv_heads:
        raise SettingError(f"query heads must be a multiple of key/value heads, got {num_heads} and {num_kv_heads}")
    return num_heads // num_kv_heads


def scores_of(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """q_h · k_s · scale of one query: q [H, D_qk], k [S, H_kv, D_qk] -> [H_kv, G, S]."""
    (H, D_qk), H_kv = q.shape, k.shape[1]
    grouped = q.view(H_kv, group_size_of(H, H_kv), D_qk)  # head h belongs to KV head h // G
    return contract("kgd,skd->kgs", grouped, k) * (D_qk**-0.5 if scale is None else scale)


def attend_query(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """One query over all the keys it sees: q [H, D_qk], k and v [S, H_kv, D] -> o [H, D_v], lse [H].

    With no key (S = 0) the sum is empty, so o = 0, and lse is 0 by definition.
    """
    scores = scores_of(q, k, scale)  # [H_kv, G, S]
    o = contract("kgs,skd->kgd", scores.softmax(-1), v).flatten(0, 1)  # [H, D_v]
    lse = (scores.logsumexp(-1) if len(k) else scores.sum(-1)).flatten()  # [H]
    return o, lse.to(torch.promote_types(lse.dtype, torch.float32))


def stack_queries(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One (o, lse) a query -> o [T, H, D_v], lse [T, H]."""
    o, lse = zip(*rows, strict=True)
    return torch.stack(o), torch.stack(lse)
