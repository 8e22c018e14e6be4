"""InfLLM (arXiv:2402.04617): blocks beyond the window, chosen by a few tokens that stand for each.

As in the authors' code (thunlp/InfLLM, inf_llm/attention/context_manager.py, config/*.yaml: blocks of 128 tokens, 4
representatives, 128 leading tokens, 16 blocks, a window of 4096, 512 queries of a prompt at a time):
- What has left the window behind the leading tokens is cut into blocks. Until a block is complete, its tokens are read
  by every query, on top of the budget: at most memory_block_size - 1 of them, in a prompt query_block - 1 more.
- A token's weight is the sum of the probabilities that the queries whose window it was in gave it, for each query head;
  the `representatives` with the highest ones stand for a block, and their mean key is what a query is multiplied with.
- The choice is one for all heads of a layer: the sum over heads of q·k, keys without rotation and the query rotated to
  the end of the window. In a prompt the mean of query_block queries chooses for them all, later ones included.
- Published, everything beyond the window is seen at that one distance (far_positions window). With own positions, the
  default here, a text within the budget gives dense attention.
"""

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.rotary import apply_rotary
from torch import Tensor

from nsa_lightning.evaluation.methods.base import SparseMethod
from nsa_lightning.evaluation.methods.rows import RowState
from nsa_lightning.evaluation.methods.scores import (
    aligned,
    chunk_scores,
    pieces,
    softmax_over,
    step_scores,
    visible,
    wide,
)
from nsa_lightning.evaluation.methods.settings import MethodSettings, blocks_of
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.rope import rotary_frequencies

# N queries, n tokens that are read, S slots, P blocks, M blocks or rows, H query heads, H_kv KV heads.


class InfLLM(SparseMethod):
    """Keeps the weight of every token and the mean key of every block's representatives."""

    name = "infllm"
    used = ("memory_block_size", "representatives", "query_block", "far_positions")

    def __init__(self, settings: MethodSettings, config: TransformerConfig, measure: bool = False) -> None:
        super().__init__(settings, config, measure)
        if settings.local < 1:
            raise SettingError(f"local must be at least 1 for infllm, got {settings.local}")
        self._chosen = settings.free // settings.memory_block_size
        self._weights = RowState(0.0)  # float32 [R, S, H]
        self._blocks = RowState(0.0)  # float32 [R, P, H, D]
        self._frequencies = rotary_frequencies(config.rope, config.query_head_dim)

    def _states(self) -> tuple[RowState, ...]:
        return self._weights, self._blocks

    def _prompt(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        choice, size = self.choice, self.choice.memory_block_size
        weights, blocks = self._kept(layer, row + 1, len(k), q)
        out = []
        for first, stop in aligned(start, len(k), choice.query_block):
            positions = torch.arange(first, stop, device=q.device)
            queries = wide(q[first - start : stop - start])
            turned = self._turned(queries, choice.local - 1 - positions)
            count = self._num_blocks(first)
            scores = torch.einsum("hd,phd->p", turned.mean(0), blocks[row, :count])
            best = scores.topk(min(self._chosen, count)).indices
            inside = torch.arange(size, device=q.device)
            far = (choice.leading + best[:, None] * size + inside).flatten()
            rest = torch.arange(choice.leading + count * size, max(stop, choice.leading), device=q.device)
            tokens = torch.cat([torch.arange(min(choice.leading, stop), device=q.device), far, rest])
            keys, near = k[tokens], tokens > positions[:, None] - choice.local
            found = chunk_scores(queries, keys)
            if choice.far_positions == "window":
                found = torch.where(near, found, chunk_scores(turned, self._turned(wide(keys), -tokens)))
            keep = tokens <= positions[:, None]
            probabilities = softmax_over(found, keep)  # [H, N, n]
            by_group = probabilities.view(k.shape[1], -1, len(tokens))
            read = torch.bmm(by_group, wide(v[tokens]).transpose(0, 1)).view(q.shape[1], len(queries), -1)
            out.append(read.transpose(0, 1).to(q.dtype))
            weights[row, tokens] += (probabilities * near).sum(1).T
            self._complete(blocks[row], weights[row], k, first, stop)
            self._count_chunk(queries, k[:stop], first, tokens, keep, count / len(queries))
        return torch.cat(out)

    def _watch(self, layer: int, row: int, start: int, q: Tensor, k: Tensor) -> None:
        """Weights of the tokens of a dense prompt, and the blocks that are complete."""
        weights, blocks = self._kept(layer, row + 1, len(k), q)
        keys = wide(k)
        for first, stop in pieces(start, len(k), q.shape[1] * len(k), q.device):
            positions = torch.arange(first, stop, device=q.device)
            scores = chunk_scores(q[first - start : stop - start], keys[:stop])
            near = torch.arange(stop, device=q.device) > positions[:, None] - self.choice.local
            weights[row, :stop] += (softmax_over(scores, visible(positions, stop)) * near).sum(1).T
        self._complete(blocks[row], weights[row], k, start, len(k))

    def _step(self, layer: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        choice, size = self.choice, self.choice.memory_block_size
        weights, blocks = (kept[rows] for kept in self._kept(layer, rows.stop, k.shape[1], q))
        tokens, count = self._step_tokens(wide(q), blocks, positions)  # [B, n]
        at, places = torch.arange(len(q), device=q.device)[:, None], tokens.clamp(min=0)
        keys, values = k[at, places], v[at, places]  # [B, n, H_kv, D]
        near = (tokens > positions[:, None] - choice.local) & (tokens >= 0)
        found = step_scores(q, keys)  # [H, B, n]
        if choice.far_positions == "window":
            turned = self._turned(wide(q), choice.local - 1 - positions)
            still = self._turned(wide(keys).flatten(0, 1), -places.flatten()).view(keys.shape)
            found = torch.where(near, found, step_scores(turned, still))
        probabilities = softmax_over(found, tokens >= 0)
        by_group = probabilities.view(k.shape[2], -1, *tokens.shape)
        out = torch.einsum("hgbn,bnhd->bhgd", by_group, wide(values)).flatten(1, 2).to(q.dtype)
        added = (probabilities * near).permute(1, 2, 0)  # [B, n, H]
        weights.scatter_add_(1, places[..., None].expand_as(added), added)
        gone = positions + 1 - choice.leading - choice.local  # tokens between the leading and the next local ones
        number = (gone // size - 1).clamp(min=0)
        inside = (choice.leading + number[:, None] * size + torch.arange(size, device=q.device)).clamp(
            max=k.shape[1] - 1
        )
        fresh = self._mean_keys(k[at, inside], weights[at, inside], inside)
        done = (gone % size == 0) & (gone >= size)
        row = at[:, 0]
        blocks[row, number] = torch.where(done.view(-1, 1, 1), fresh, blocks[row, number])
        self._count_step(q, k, tokens[:, None], positions, count)
        return out

    def _step_tokens(self, q: Tensor, blocks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What a query of each sequence reads, int64 [B, n] with -1 for none, and the blocks that it chose from [B]."""
        choice, size, device = self.choice, self.choice.memory_block_size, q.device
        count = ((positions - choice.leading - choice.local) // size).clamp(min=0)
        turned = self._turned(q, choice.local - 1 - positions)
        scores = torch.einsum("bhd,bphd->bp", turned, blocks)
        scores = scores.masked_fill(torch.arange(blocks.shape[1], device=device) >= count[:, None], -torch.inf)
        best = scores.topk(min(self._chosen, blocks.shape[1]), dim=-1)
        far = choice.leading + best.indices[..., None] * size + torch.arange(size, device=device)
        far = far.masked_fill((best.values == -torch.inf)[..., None], -1).flatten(1)
        rest = choice.leading + count[:, None] * size + torch.arange(choice.local + size, device=device)
        leading = torch.arange(choice.leading, device=device).expand(len(q), -1)
        tokens = torch.cat([leading, far, rest], dim=1)
        return tokens.masked_fill(tokens > positions[:, None], -1), count

    def _kept(self, layer: int, rows: int, length: int, q: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [R, S, H] and blocks [R, P, H, D] of a layer's sequences."""
        like, (heads, dim) = wide(q[:0]), q.shape[1:]
        num_blocks = blocks_of(length, self.choice.memory_block_size)
        return (
            self._weights.of(layer, rows, length, (heads,), like),
            self._blocks.of(layer, rows, num_blocks, (heads, dim), like),
        )

    def _num_blocks(self, position: int) -> int:
        """Complete blocks beyond the window of a query."""
        return max((position - self.choice.leading - self.choice.local) // self.choice.memory_block_size, 0)

    def _complete(self, blocks: Tensor, weights: Tensor, k: Tensor, start: int, stop: int) -> None:
        """Represent the blocks that left the window with the queries from `start` to `stop`."""
        first, last, size = self._num_blocks(start), self._num_blocks(stop), self.choice.memory_block_size
        if last > first:
            number = torch.arange(first, last, device=k.device)[:, None]
            tokens = self.choice.leading + number * size + torch.arange(size, device=k.device)
            blocks[first:last] = self._mean_keys(k[tokens], weights[tokens], tokens)

    def _mean_keys(self, keys: Tensor, weights: Tensor, tokens: Tensor) -> Tensor:
        """Mean key, without rotation, of the tokens with the highest weights.

        Args:
            keys: [M, size, H_kv, D].
            weights: [M, size, H].
            tokens: their positions, [M, size].

        Returns:
            [M, H, D].
        """
        top = weights.topk(self.choice.representatives, dim=1).indices  # [M, r, H]
        heads = weights.shape[-1]
        block = torch.arange(len(keys), device=keys.device)[:, None, None]
        kv = torch.arange(heads, device=keys.device) // (heads // keys.shape[2])
        chosen = wide(keys[block, top, kv])  # [M, r, H, D]
        angles = -tokens.gather(1, top.flatten(1)).flatten()
        still = self._turned(chosen.flatten(0, 2)[:, None], angles)
        return still.view(chosen.shape).mean(1)

    def _turned(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotate heads on by some positions, x [M, H, D], by int64 [M]."""
        self._frequencies = self._frequencies.to(x.device)
        angles = by[:, None].to(torch.float32) * self._frequencies
        return apply_rotary(x, angles.cos(), angles.sin())

    def _more_bytes(self, length: int, item: int) -> int:
        """The mean keys in the model's type, and a float32 weight of every token that is in no block yet."""
        shape, size = self.config.layer_shape, self.choice.memory_block_size
        waiting = min(length, self.choice.local + size) * shape.num_heads * 4
        return self._num_blocks(length) * shape.num_heads * shape.head_dim * item + waiting
