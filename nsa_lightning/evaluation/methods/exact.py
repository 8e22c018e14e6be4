"""Methods that know the dense scores: the control `full`, and the oracles that no selector reads better tokens than.

    exact_top: the tokens with the highest q·k of each query head
    exact_top_blocks: the blocks with the most probability, summed over the heads of a KV group

Exact-Top is the oracle of arXiv:2502.11089, section 4.2, which computes full scores and keeps the highest tokens; a
prompt is sparse too. Blocks follow NSA's own rules: whole ones, the query's own counted among the local ones.
"""

import torch
from torch import Tensor

from nsa_lightning.evaluation.methods.base import SparseMethod
from nsa_lightning.evaluation.methods.counts import best_blocks
from nsa_lightning.evaluation.methods.scores import (
    chunk_read,
    chunk_scores,
    forced,
    group_sum,
    pieces,
    softmax_over,
    step_scores,
    visible,
    wide,
)
from nsa_lightning.evaluation.methods.settings import MethodSettings
from nsa_lightning.model.config import TransformerConfig

# N queries of one sequence or of several, S keys, H query heads, H_kv KV heads, X heads that choose.


class _ByScores(SparseMethod):
    """A choice from the dense scores of each query."""

    def _prompt(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, keys, values = [], wide(k), wide(v)
        for first, stop in pieces(start, len(k), q.shape[1] * len(k), q.device):
            positions = torch.arange(first, stop, device=q.device)
            queries = q[first - start : stop - start]
            scores = chunk_scores(queries, keys[:stop])
            keep = self._keep(scores, positions)
            if self._counts is not None:
                self._counts.add_prompt(scores, keep, first, self._products(positions))
            out.append(chunk_read(queries, keys[:stop], values[:stop], keep, scores).out)
        return torch.cat(out)

    def _step(self, layer: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        scores = step_scores(q, k)
        keep = self._keep(scores, positions)
        if self._counts is not None:
            self._counts.add(scores, keep, positions, self._products(positions))
        by_group = softmax_over(scores, keep).view(k.shape[2], -1, *scores.shape[1:])  # [H_kv, G, B, S]
        return torch.einsum("hgbs,bshd->bhgd", by_group, wide(v)).flatten(1, 2).to(q.dtype)

    def _keep(self, scores: Tensor, positions: Tensor) -> Tensor:
        """What each query reads, by its scores [H, N, S]: bool, broadcasts to them."""
        raise NotImplementedError

    def _products(self, positions: Tensor) -> Tensor | float:
        """Keys that a query is multiplied with to choose."""
        return positions + 1


class Full(_ByScores):
    """All tokens: dense attention, computed as the oracles are."""

    name = "full"

    def _keep(self, scores: Tensor, positions: Tensor) -> Tensor:
        return visible(positions, scores.shape[-1]).expand_as(scores)

    def _products(self, positions: Tensor) -> Tensor | float:
        return 0.0


class ExactTop(_ByScores):
    """The highest tokens of each head, or of each group by the sum of its heads' probabilities."""

    name = "exact_top"
    used = ("per_group",)

    def _keep(self, scores: Tensor, positions: Tensor) -> Tensor:
        choice, length = self.choice, scores.shape[-1]
        tokens = torch.arange(length, device=scores.device)
        fixed, seen = forced(positions, tokens, choice.leading, choice.local), visible(positions, length)
        candidates = group_sum(softmax_over(scores, seen), self.config.num_kv_heads) if choice.per_group else scores
        candidates = candidates.masked_fill(fixed | ~seen, -torch.inf)  # [X, N, S]
        top = candidates.topk(min(choice.free, length), dim=-1, sorted=False).indices
        keep = fixed.expand_as(candidates).clone().scatter_(-1, top, True) & seen
        return keep.repeat_interleave(len(scores) // len(keep), dim=0)


class ExactTopBlocks(_ByScores):
    """The blocks with the most probability of each KV group."""

    name = "exact_top_blocks"
    used = ("block_size",)

    def __init__(self, settings: MethodSettings, config: TransformerConfig, measure: bool = False) -> None:
        settings.check_blocks("block_size")
        super().__init__(settings, config, measure)

    def _keep(self, scores: Tensor, positions: Tensor) -> Tensor:
        probabilities = softmax_over(scores, visible(positions, scores.shape[-1]))
        return best_blocks(probabilities, positions, self.choice, self.config.num_kv_heads)
