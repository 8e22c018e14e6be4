"""H2O (arXiv:2306.14048): keep the last tokens and those with the most attention so far; drop the rest for good.

    sum[h, s] = sum of p[h, t, s] over the queries t so far that could read s

As in the authors' code (FMInference/H2O, h2o_hf/utils_real_drop and utils_hh): a prompt is dense, and its column sums
of probabilities choose what is left of it; then every new token drops the one with the lowest sum that is not among
the last ones. Each head has its own tokens (their models have one KV head a query head). They split the budget in
halves, heavy and recent, and force no leading tokens: leading 0, local budget / 2. Tokens keep their own positions, as
with their masks (utils_hh); their streaming demo numbers them anew.

A sparse prompt (phases both) drops tokens every `evict_every` of them, enough to make room for the next ones, as their
`evict_for_space` does; with 1 it is the paper's algorithm over the whole text. A query then reads between budget -
evict_every + 1 and budget tokens.
"""

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.evaluation.methods.base import SparseMethod
from nsa_lightning.evaluation.methods.rows import RowState
from nsa_lightning.evaluation.methods.scores import (
    aligned,
    chunk_scores,
    group_sum,
    pieces,
    softmax_over,
    step_read,
    visible,
    wide,
)
from nsa_lightning.evaluation.methods.settings import MethodSettings
from nsa_lightning.model.config import TransformerConfig

# N queries, L tokens of a sequence, H query heads, H_kv KV heads, X heads that choose, C tokens that are kept.


class H2O(SparseMethod):
    """Each sequence has `budget` places for tokens; a new one takes the place of the one that is dropped."""

    name = "h2o"
    used = ("per_group", "evict_every")
    published_phases = "decode"

    def __init__(self, settings: MethodSettings, config: TransformerConfig, measure: bool = False) -> None:
        super().__init__(settings, config, measure)
        if self.sparse_prompt:
            room = settings.budget - settings.leading - max(settings.local - 1, 0)
            if settings.budget % settings.evict_every or settings.evict_every > room:
                raise SettingError(
                    f"evict_every must divide budget and be at most the {room} tokens of it that are neither leading "
                    f"nor local, got {settings.evict_every} and {settings.budget}"
                )
        self._heads = config.num_kv_heads if settings.per_group else config.num_heads
        self._tokens = RowState(-1)  # int64 [R, X, C], -1 for a free place
        self._sums = RowState(0.0)  # float32 [R, X, C]
        self._prompts: dict[tuple[int, int], Tensor] = {}  # by layer and row: sums of a dense prompt, [X, L]

    def begin(self) -> None:
        """Forget all sequences."""
        super().begin()
        self._prompts.clear()

    def _states(self) -> tuple[RowState, ...]:
        return self._tokens, self._sums

    def _kept(self, layer: int, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and sums of a layer's sequences, [R, X, C] each."""
        size, device = (self.choice.budget,), like.device
        tokens = self._tokens.of(layer, rows, self._heads, size, torch.empty(0, dtype=torch.int64, device=device))
        return tokens, self._sums.of(layer, rows, self._heads, size, wide(like[:0]))

    def _must_stay_sparse(self, layer: int, row: int, start: int) -> bool:
        return start > 0 and self.sparse_answer and (layer, row) not in self._prompts

    def _watch(self, layer: int, row: int, start: int, q: Tensor, k: Tensor) -> None:
        """Add up the probabilities of a dense prompt's queries, and keep what is best so far."""
        length, keys = len(k), wide(k)
        sums = keys.new_zeros(self._heads, length)
        if start:
            sums[:, :start] = self._prompts[layer, row]
        for first, stop in pieces(start, length, q.shape[1] * length, q.device):
            scores = chunk_scores(q[first - start : stop - start], keys[:stop])
            seen = visible(torch.arange(first, stop, device=q.device), stop)
            sums[:, :stop] += group_sum(softmax_over(scores, seen).sum(1), self._heads)
        self._prompts[layer, row] = sums
        tokens = torch.arange(length, device=q.device).expand_as(sums)
        last = torch.full((), length, device=q.device)
        best = self._priority(tokens, sums, last).topk(min(self.choice.budget, length), dim=-1).indices
        kept_tokens, kept_sums = self._kept(layer, row + 1, k)
        kept_tokens[row, :, : best.shape[1]] = best
        kept_sums[row, :, : best.shape[1]] = sums.gather(1, best)

    def _prompt(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        all_tokens, all_sums = self._kept(layer, row + 1, k)
        tokens, sums = all_tokens[row], all_sums[row]  # [X, C], views
        heads, every = q.shape[1], self.choice.evict_every
        kv = torch.arange(heads, device=q.device)[:, None] // (heads // k.shape[1])
        out = []
        for first, stop in aligned(start, len(k), every):
            room = every - first % every  # until the next eviction
            at = torch.full((), first, device=q.device)
            lowest = self._priority(tokens, sums, at).topk(room, dim=-1, largest=False, sorted=True).indices
            tokens.scatter_(1, lowest, -1)
            sums.scatter_(1, lowest, 0.0)
            positions = torch.arange(first, stop, device=q.device)
            tokens.scatter_(1, lowest[:, : stop - first], positions.expand(self._heads, -1))
            queries = q[first - start : stop - start]
            keep = (tokens[:, None] >= 0) & (tokens[:, None] <= positions[:, None])  # [X, N, C]
            places = tokens.clamp(min=0).repeat_interleave(heads // self._heads, dim=0)  # [H, C]
            scores = torch.bmm(wide(queries).transpose(0, 1), wide(k[places, kv]).mT) * q.shape[-1] ** -0.5
            probabilities = softmax_over(scores, keep.repeat_interleave(heads // self._heads, dim=0))
            out.append(torch.bmm(probabilities, wide(v[places, kv])).transpose(0, 1).to(q.dtype))
            sums += group_sum(probabilities.sum(1), self._heads)
            self._count_chunk(queries, k[:stop], first, tokens, keep, 0.0)
        return torch.cat(out)

    def _step(self, layer: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        for row in range(rows.start, rows.stop):
            self._prompts.pop((layer, row), None)  # what follows can't be dense any more
        tokens, sums = (kept[rows] for kept in self._kept(layer, rows.stop, k))  # [B, X, C], views
        at = positions.view(-1, 1, 1)
        lowest = self._priority(tokens, sums, at).argmin(-1, keepdim=True)
        tokens.scatter_(-1, lowest, at.expand_as(lowest))
        sums.scatter_(-1, lowest, 0.0)
        read = step_read(q, k, v, tokens)
        sums += group_sum(read.probabilities, self._heads).transpose(0, 1)
        self._count_step(q, k, tokens, positions, 0.0)
        return read.out

    def _priority(self, tokens: Tensor, sums: Tensor, at: Tensor) -> Tensor:
        """What is dropped first before the token at `at` comes: free places, then the lowest sums; forced ones last."""
        fixed = (tokens < self.choice.leading) | (tokens > at - self.choice.local)
        return sums.masked_fill(fixed, torch.inf).masked_fill(tokens < 0, -torch.inf)

    def _more_bytes(self, length: int, item: int) -> int:
        """Each head that chooses has its own keys and values of what it keeps, with a position and a sum."""
        shape, kept = self.config.layer_shape, min(length, self.choice.budget)
        each = (shape.head_dim + shape.value_head_dim) * item + 8
        return kept * self._heads * each - length * self._token_bytes(item)
