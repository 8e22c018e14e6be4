"""What the methods share: scores of queries, what they may see, and attention to a part of it.

Everything is computed in float32 (float64 for float64), a few queries at a time, so that scores against 64K tokens stay
within some hundred megabytes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lightning.evaluation.methods.settings import blocks_of

# N queries of one sequence or of several, L keys of a sequence, S slots of a cache, H query heads, H_kv KV heads,
# G = H / H_kv, X heads that choose (H or H_kv), P blocks, n tokens that are read.

_NUMBERS_ON_CPU, _NUMBERS_ON_GPU = 2**22, 2**26
"""Scores that are held at a time."""


class Read(NamedTuple):
    """The outcome of attention to a part of the keys."""

    out: Tensor  # [N, H, D_v]
    probabilities: Tensor  # float [H, N, n], 0 for what was not read


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pieces(
    start: int, stop: int, numbers: int, device: torch.device, longest: int | None = None
) -> Iterator[tuple[int, int]]:
    """Cut positions into runs whose scores fit, `numbers` of them a query; of at most `longest` positions each."""
    step = max((_NUMBERS_ON_GPU if device.type == "cuda" else _NUMBERS_ON_CPU) // numbers, 1)
    step = step if longest is None else min(step, longest)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def aligned(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut positions at the multiples of `size`."""
    while start < stop:
        end = min(start - start % size + size, stop)
        yield start, end
        start = end


def chunk_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores of queries of one sequence, q [N, H, D], k [n, H_kv, D] -> [H, N, n]."""
    (count, heads, dim), kv_heads = q.shape, k.shape[1]
    q = wide(q).view(count, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    found = torch.bmm(q * dim**-0.5, wide(k).permute(1, 2, 0))
    return found.view(heads, count, len(k))


def step_scores(q: Tensor, k: Tensor) -> Tensor:
    """Scaled scores of a query of each sequence, q [B, H, D], k [B, S, H_kv, D] -> [H, B, S]."""
    batch, heads, dim = q.shape
    q = wide(q).view(batch, k.shape[2], -1, dim) * dim**-0.5
    return torch.einsum("bhgd,bshd->hgbs", q, wide(k)).reshape(heads, batch, k.shape[1])


def visible(positions: Tensor, length: int) -> Tensor:
    """Which of the first tokens each query may see, bool [N, length]."""
    return torch.arange(length, device=positions.device) <= positions[:, None]


def forced(positions: Tensor, tokens: Tensor, leading: int, local: int) -> Tensor:
    """Which tokens are among the leading and local ones of each query, positions [N], tokens [n] -> bool [N, n]."""
    near = tokens > positions[:, None] - local
    return ((tokens < leading) | near) & (tokens <= positions[:, None])


def softmax_over(scores: Tensor, keep: Tensor) -> Tensor:
    """Probabilities over what is kept, 0 elsewhere; all 0 where nothing is, [H, N, n]."""
    scores = scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0)


def chunk_read(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scores: Tensor | None = None) -> Read:
    """Attend queries of one sequence to tokens that all heads were given.

    Args:
        q: [N, H, D].
        k: [n, H_kv, D].
        v: [n, H_kv, D_v].
        keep: bool [N, n] or [H, N, n], what each may read.
        scores: those of `chunk_scores`, if they are known.
    """
    probabilities = softmax_over(chunk_scores(q, k) if scores is None else scores, keep)
    kv_heads, count = k.shape[1], len(q)
    out = torch.bmm(probabilities.view(kv_heads, -1, len(k)), wide(v).transpose(0, 1))
    out = out.view(q.shape[1], count, -1).transpose(0, 1)
    return Read(out.to(q.dtype), probabilities)


def step_read(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor) -> Read:
    """Attend a query of each sequence to its own tokens.

    Args:
        q: [B, H, D].
        k: [B, S, H_kv, D].
        v: [B, S, H_kv, D_v].
        tokens: int64 [B, X, n], -1 for none; X heads choose for H.
    """
    (batch, heads, dim), kv_heads = q.shape, k.shape[2]
    tokens = tokens.repeat_interleave(heads // tokens.shape[1], dim=1)  # [B, H, n]
    rows = torch.arange(batch, device=q.device)[:, None, None]
    kv = torch.arange(heads, device=q.device)[:, None] // (heads // kv_heads)
    places = tokens.clamp(min=0)
    scores = torch.einsum("bhd,bhnd->hbn", wide(q) * dim**-0.5, wide(k[rows, places, kv]))
    probabilities = softmax_over(scores, (tokens >= 0).transpose(0, 1))
    out = torch.einsum("hbn,bhnd->bhd", probabilities, wide(v[rows, places, kv]))
    return Read(out.to(q.dtype), probabilities)


def group_sum(x: Tensor, heads: int) -> Tensor:
    """Sum what query heads have over those of a group, [H, ...] -> [X, ...]."""
    return x if len(x) == heads else x.view(heads, -1, *x.shape[1:]).sum(1)


def top_blocks(scores: Tensor, positions: Tensor, size: int, leading: int, local: int, count: int) -> Tensor:
    """The blocks of each query: the forced ones, then those of the highest scores.

    Args:
        scores: [X, N, P].
        positions: of the queries, [N].
        size: tokens of a block.
        leading: tokens whose blocks are forced; so are those of the `local` last ones, counted with the query's own.
        local: see leading.
        count: blocks of a query.

    Returns:
        int64 [X, N, min(count, P)], -1 for none.
    """
    own = (positions // size)[:, None]  # [N, 1]
    block = torch.arange(scores.shape[-1], device=scores.device)
    first = block < blocks_of(leading, size)
    near = block > own - blocks_of(local, size) if local else torch.zeros_like(first)
    scores = scores.masked_fill(first | near, torch.inf).masked_fill(block > own, -torch.inf)
    top = scores.topk(min(count, scores.shape[-1]), dim=-1)
    return top.indices.masked_fill(top.values == -torch.inf, -1)


def block_mask(blocks: Tensor, num_blocks: int) -> Tensor:
    """Indices with -1 for none as a mask, [X, N, n] -> bool [X, N, num_blocks]."""
    mask = torch.zeros(*blocks.shape[:-1], num_blocks + 1, dtype=torch.bool, device=blocks.device)
    mask.scatter_(-1, blocks.masked_fill(blocks < 0, num_blocks), True)
    return mask[..., :-1]


def token_mask(blocks: Tensor, size: int, positions: Tensor, length: int, heads: int) -> Tensor:
    """The tokens of blocks that each query may see, [X, N, n] -> bool [H, N, length]."""
    mask = block_mask(blocks, blocks_of(length, size)).repeat_interleave(size, dim=-1)[..., :length]
    mask = mask & visible(positions, length)
    return mask.repeat_interleave(heads // len(mask), dim=0)
