"""Quest (arXiv:2406.10774): the pages that may hold the highest scores, by the extremes of their keys.

    bound[h, j] = sum_d max(q[h, d] · min_j[d], q[h, d] · max_j[d]),   extremes over the rotated keys of page j

As in the authors' evaluation (mit-han-lab/Quest, evaluation/quest_attention.py and scripts/longbench.sh): pages of 16
tokens, budget / 16 of them for each query head, the last incomplete page among the candidates, the first two layers
dense, prompts dense; their LongBench runs feed the question token by token, so that it is read sparsely. There no page
is forced: leading and local 0 give that. Here forced tokens are whole pages, the query's own counted among the local
ones. Query heads that share keys choose each for itself (their models have one KV head a query head).
"""

import torch
from torch import Tensor

from nsa_lightning.evaluation.methods.base import SparseMethod
from nsa_lightning.evaluation.methods.rows import RowState
from nsa_lightning.evaluation.methods.scores import (
    chunk_read,
    chunk_scores,
    group_sum,
    pieces,
    step_read,
    token_mask,
    top_blocks,
    wide,
)
from nsa_lightning.evaluation.methods.settings import MethodSettings, blocks_of
from nsa_lightning.model.config import TransformerConfig

# N queries, L keys, P pages, H query heads, H_kv KV heads, G = H / H_kv, X heads that choose.


class Quest(SparseMethod):
    """The pages with the highest bounds; a page's extremes are kept and follow its tokens."""

    name = "quest"
    used = ("page_size", "per_group")
    published_phases = "decode"
    published_dense_layers = 2

    def __init__(self, settings: MethodSettings, config: TransformerConfig, measure: bool = False) -> None:
        settings.check_blocks("page_size")
        super().__init__(settings, config, measure)
        self._extremes = RowState(0.0)  # [R, P, 2, H_kv, D]: maxima, minima

    def _states(self) -> tuple[RowState, ...]:
        return (self._extremes,)

    def _prompt(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, heads = self.choice.page_size, q.shape[1]
        self._watch(layer, row, start, q, k)
        extremes = self._extremes.of(layer, row + 1, 1, (), k)[row, : blocks_of(len(k), size)]
        out, keys, values = [], wide(k), wide(v)
        for first, stop in pieces(start, len(k), heads * len(k), q.device):
            positions = torch.arange(first, stop, device=q.device)
            queries = q[first - start : stop - start]
            bounds = _chunk_bounds(queries, extremes[: blocks_of(stop, size)])
            own = _own_page_bounds(queries, keys[first - first % size : stop], first % size, size)
            bounds.scatter_(-1, (positions // size).expand(heads, -1)[..., None], own[..., None])
            pages = self._pages(bounds, positions)
            keep = token_mask(pages, size, positions, stop, heads)
            scores = chunk_scores(queries, keys[:stop])
            out.append(chunk_read(queries, keys[:stop], values[:stop], keep, scores).out)
            if self._counts is not None:
                self._counts.add_prompt(scores, keep, first, self._products(positions))
        return torch.cat(out)

    def _watch(self, layer: int, row: int, start: int, q: Tensor, k: Tensor) -> None:
        """Extremes of the pages that new tokens are in."""
        size, (length, kv_heads, dim) = self.choice.page_size, k.shape
        first = start // size
        kept = self._extremes.of(layer, row + 1, blocks_of(length, size), (2, kv_heads, dim), k)
        keys = k[first * size :]
        padded = torch.cat([keys, keys[-1:].expand(-len(keys) % size, -1, -1)]).unflatten(0, (-1, size))
        kept[row, first : first + len(padded)] = torch.stack([padded.amax(1), padded.amin(1)], dim=1)

    def _step(self, layer: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        size, slots = self.choice.page_size, k.shape[1]
        num_pages = blocks_of(slots, size)
        kept = self._extremes.of(layer, rows.stop, num_pages, (2, *k.shape[2:]), k)[rows]
        at, own = torch.arange(len(q), device=q.device), positions // size
        new = k[at, positions][:, None].expand(-1, 2, -1, -1)  # [B, 2, H_kv, D]
        old = kept[at, own]
        more = torch.stack([torch.maximum(old[:, 0], new[:, 0]), torch.minimum(old[:, 1], new[:, 1])], dim=1)
        kept[at, own] = torch.where((positions % size == 0).view(-1, 1, 1, 1), new, more)
        pages = self._pages(_step_bounds(q, kept[:, :num_pages]), positions).transpose(0, 1)  # [B, X, n]
        tokens = pages[..., None] * size + torch.arange(size, device=q.device)
        tokens = tokens.masked_fill((pages[..., None] < 0) | (tokens > positions.view(-1, 1, 1, 1)), -1).flatten(2)
        self._count_step(q, k, tokens, positions, self._products(positions))
        return step_read(q, k, v, tokens).out

    def _pages(self, bounds: Tensor, positions: Tensor) -> Tensor:
        """The pages of each query by their bounds [H, N, P]: int64 [X, N, n], -1 for none."""
        choice, size = self.choice, self.choice.page_size
        bounds = group_sum(bounds, self.config.num_kv_heads) if choice.per_group else bounds
        return top_blocks(bounds, positions, size, choice.leading, choice.local, choice.budget // size)

    def _products(self, positions: Tensor) -> Tensor:
        """Two vectors of each page."""
        return 2 * (positions // self.choice.page_size + 1)

    def _more_bytes(self, length: int, item: int) -> int:
        shape = self.config.layer_shape
        return blocks_of(length, self.choice.page_size) * 2 * shape.num_kv_heads * shape.head_dim * item


def _chunk_bounds(q: Tensor, extremes: Tensor) -> Tensor:
    """Bounds of pages for queries of one sequence, q [N, H, D], extremes [P, 2, H_kv, D] -> [H, N, P]."""
    signed = torch.cat([wide(q).clamp(min=0), wide(q).clamp(max=0)], dim=-1)
    pages = torch.cat([extremes[:, 0], extremes[:, 1]], dim=-1)  # [P, H_kv, 2 D]
    return chunk_scores(signed, pages)


def _step_bounds(q: Tensor, extremes: Tensor) -> Tensor:
    """Bounds of pages for a query of each sequence, q [B, H, D], extremes [B, P, 2, H_kv, D] -> [H, B, P]."""
    by_group = wide(q).view(len(q), extremes.shape[3], -1, q.shape[-1])  # [B, H_kv, G, D]
    highest = torch.einsum("bhgd,bphd->hgbp", by_group.clamp(min=0), wide(extremes[:, :, 0]))
    lowest = torch.einsum("bhgd,bphd->hgbp", by_group.clamp(max=0), wide(extremes[:, :, 1]))
    return (highest + lowest).flatten(0, 1) * (2 * q.shape[-1]) ** -0.5


def _own_page_bounds(q: Tensor, k: Tensor, skipped: int, size: int) -> Tensor:
    """Bounds of the pages that queries stand in, over the tokens up to each, [H, N].

    Args:
        q: [N, H, D].
        k: keys from the beginning of the first query's page to the last query, [skipped + N, H_kv, D].
        skipped: tokens of that page before the first query.
        size: tokens of a page.
    """
    padded = torch.cat([k, k[-1:].expand(-len(k) % size, -1, -1)]).unflatten(0, (-1, size))
    highest = padded.cummax(1).values.flatten(0, 1)[skipped : len(k)]  # [N, H_kv, D]
    lowest = padded.cummin(1).values.flatten(0, 1)[skipped : len(k)]
    by_group = wide(q).unflatten(1, (k.shape[1], -1))  # [N, H_kv, G, D]
    bounds = by_group.clamp(min=0) * highest[:, :, None] + by_group.clamp(max=0) * lowest[:, :, None]
    return bounds.sum(-1).flatten(1).T * (2 * q.shape[-1]) ** -0.5
