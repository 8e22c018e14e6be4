"""The floor of all methods: the leading tokens and the local ones, nothing chosen (StreamingLLM, arXiv:2309.17453).

Tokens keep their own positions; StreamingLLM itself numbers what is left in its cache anew. With 4 leading tokens and
the rest of the budget local this is its usual setting.
"""

import torch
from torch import Tensor

from nsa_lightning.evaluation.methods.base import SparseMethod
from nsa_lightning.evaluation.methods.scores import chunk_read, forced, pieces, step_read

# N queries, n tokens in reach of a piece of a prompt.


class Sliding(SparseMethod):
    """The leading tokens, and as many of the last ones as the rest of the budget holds."""

    name = "sliding"

    @property
    def _window(self) -> int:
        return self.choice.budget - self.choice.leading

    def _prompt(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        leading, window, out = self.choice.leading, self._window, []
        numbers = q.shape[1] * 2 * self.choice.budget
        for first, stop in pieces(start, len(k), numbers, q.device, longest=self.choice.budget):
            positions = torch.arange(first, stop, device=q.device)
            head = min(leading, stop)
            near = max(first - window + 1, head)
            tokens = torch.cat([torch.arange(0, head, device=q.device), torch.arange(near, stop, device=q.device)])
            queries = q[first - start : stop - start]
            keep = forced(positions, tokens, leading, window)
            out.append(chunk_read(queries, k[tokens], v[tokens], keep).out)
            self._count_chunk(queries, k[:stop], first, tokens, keep, 0.0)
        return torch.cat(out)

    def _step(self, layer: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        leading = torch.arange(self.choice.leading, device=q.device).expand(len(q), -1)
        near = positions[:, None] - torch.arange(self._window, device=q.device)  # [B, window]
        tokens = torch.cat(
            [leading.masked_fill(leading > positions[:, None], -1), near.masked_fill(near < self.choice.leading, -1)],
            dim=1,
        )[:, None]
        self._count_step(q, k, tokens, positions, 0.0)
        return step_read(q, k, v, tokens).out

    def _more_bytes(self, length: int, item: int) -> int:
        return self._token_bytes(item) * (min(length, self.choice.budget) - length)
