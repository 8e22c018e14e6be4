"""Attention a chunk of queries at a time: what keys a chunk sees, and forward and backward over all chunks.

Forward saves the inputs, the output and the log-sum-exp, and backward recomputes each chunk's probabilities from them:
beside its inputs and outputs a stage holds one chunk of scores.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_kernels.eager.softmax import attend, attend_backward, attend_backward_of_finite_pairs, may_be_infinite
from nsa_kernels.precision import without_autocast

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv, D head dim, C rows of compressed blocks, n selected
# blocks, l' tokens in one of them. Inside a chunk: B independent problems of M query rows and N keys each.

_CHUNK_BYTES = {"cpu": 2**21}
_OTHER_CHUNK_BYTES = 2**28
"""Size of a chunk's largest buffer: what a CPU core caches, and what keeps an accelerator busy."""


@dataclass(frozen=True)
class RunsInChunks:
    """Query t sees the key rows first[t] ... end[t] - 1: the compressed and the sliding branch."""

    first: Tensor  # int64 [T]
    end: Tensor  # int64 [T]
    chunks: list[tuple[slice, slice]]  # queries, and the run of key rows that holds all they see

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor]]:
        for queries, keys in self.chunks:
            rows = torch.arange(keys.start, keys.stop, device=self.first.device)
            hidden = (rows < self.first[queries, None]) | (rows >= self.end[queries, None])  # [c, N]
            yield queries, keys, hidden

    def query_rows(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """[c, H, D] -> [H_kv, c * G, D]."""
        return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1).flatten(1, 2)

    def from_query_rows(self, x: Tensor, num_queries: int) -> Tensor:
        """[H_kv, c * G, ...] -> [c, H, ...]."""
        return x.unflatten(1, (num_queries, -1)).transpose(0, 1).flatten(1, 2)

    def for_rows(self, hidden: Tensor, group_size: int) -> Tensor:
        """[c, N] -> [c * G, N]."""
        return hidden.repeat_interleave(group_size, dim=0)

    def take(self, x: Tensor, keys: Any) -> Tensor:
        """The keys of a chunk, [H_kv, N, D]."""
        return x[keys].transpose(0, 1)

    def add(self, total: Tensor, keys: Any, part: Tensor) -> None:
        """Add the gradients [H_kv, N, D] of what `take` took."""
        total[keys] += part.transpose(0, 1)


@dataclass(frozen=True)
class BlocksInChunks:
    """Query t sees the tokens up to its own in its selected blocks; keys are stored as blocks [H_kv * B, l', D]."""

    rows: Tensor  # int64 [T, H_kv, n], row of each selected block, any row for an empty slot
    visible: Tensor  # int64 [T, H_kv, n], leading tokens of the block that the query sees; 0 for an empty slot
    block_size: int
    chunk: int

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        slots = torch.arange(self.block_size, device=self.rows.device)
        for start in range(0, len(self.rows), self.chunk):
            queries = slice(start, min(start + self.chunk, len(self.rows)))
            hidden = slots >= self.visible[queries, ..., None]  # [c, H_kv, n, l']
            yield queries, self.rows[queries].flatten(), hidden.flatten(2).flatten(0, 1)

    def query_rows(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """[c, H, D] -> [c * H_kv, G, D]."""
        return x.unflatten(1, (num_kv_heads, -1)).flatten(0, 1)

    def from_query_rows(self, x: Tensor, num_queries: int) -> Tensor:
        """[c * H_kv, G, ...] -> [c, H, ...]."""
        return x.unflatten(0, (num_queries, -1)).flatten(1, 2)

    def for_rows(self, hidden: Tensor, group_size: int) -> Tensor:
        """[c * H_kv, n * l'] -> [c * H_kv, 1, n * l']."""
        return hidden.unsqueeze(1)

    def take(self, x: Tensor, keys: Any) -> Tensor:
        """The keys of a chunk, [c * H_kv, n * l', D]."""
        blocks = x.index_select(0, keys)  # [c * H_kv * n, l', D]
        return blocks.view(-1, self.rows.shape[-1] * self.block_size, x.shape[-1])

    def add(self, total: Tensor, keys: Any, part: Tensor) -> None:
        """Add the gradients [c * H_kv, n * l', D] of what `take` took."""
        total.index_add_(0, keys, part.reshape(-1, *total.shape[1:]))


class ChunkedAttention(torch.autograd.Function):
    """o, lse of softmax attention, computed and differentiated one chunk of queries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_kv_heads: int,
        scale: float,
        chunks: RunsInChunks | BlocksInChunks,
    ) -> tuple[Tensor, Tensor]:
        """o [T, H, D_v] in q's dtype and lse [T, H], of which o has a gradient."""
        with without_autocast(q):
            return ChunkedAttention._forward(ctx, q, k, v, num_kv_heads, scale, chunks)

    @staticmethod
    def _forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        num_kv_heads: int,
        scale: float,
        chunks: RunsInChunks | BlocksInChunks,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        o = q.new_empty(*q.shape[:2], v.shape[-1])
        lse = q.new_empty(q.shape[:2], dtype=dtype)
        watchful = may_be_infinite(v)
        for queries, keys, hidden in chunks:
            num_queries = queries.stop - queries.start
            o_rows, lse_rows = attend(
                chunks.query_rows(q[queries], num_kv_heads).to(dtype) * scale,
                chunks.take(k, keys).to(dtype),
                chunks.take(v, keys).to(dtype),
                chunks.for_rows(hidden, q.shape[1] // num_kv_heads),
                watchful,
            )
            o[queries] = chunks.from_query_rows(o_rows, num_queries).to(o.dtype)
            lse[queries] = chunks.from_query_rows(lse_rows, num_queries)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.num_kv_heads, ctx.scale, ctx.chunks = num_kv_heads, scale, chunks
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_o: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        with without_autocast(grad_o):
            return ChunkedAttention._backward(ctx, grad_o)

    @staticmethod
    def _backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        num_kv_heads, scale, chunks = ctx.num_kv_heads, ctx.scale, ctx.chunks
        dtype = lse.dtype
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        delta = (o.to(dtype) * grad_o.to(dtype)).sum(-1)  # [T, H]
        watchful = any(map(may_be_infinite, (q, k, v, lse, delta, grad_o)))
        differentiate = attend_backward_of_finite_pairs if watchful else attend_backward
        for queries, keys, hidden in chunks:
            num_queries = queries.stop - queries.start
            q_part, k_part, v_part = differentiate(
                chunks.query_rows(q[queries], num_kv_heads).to(dtype) * scale,
                chunks.take(k, keys).to(dtype),
                chunks.take(v, keys).to(dtype),
                chunks.for_rows(hidden, q.shape[1] // num_kv_heads),
                chunks.query_rows(lse[queries, :, None], num_kv_heads),
                chunks.query_rows(delta[queries, :, None], num_kv_heads),
                chunks.query_rows(grad_o[queries], num_kv_heads).to(dtype),
            )
            grad_q[queries] = (chunks.from_query_rows(q_part, num_queries) * scale).to(q.dtype)
            chunks.add(grad_k, keys, k_part)
            chunks.add(grad_v, keys, v_part)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype), None, None, None


def chunk_size(device: torch.device, bytes_per_query: int) -> int:
    """Queries a chunk, so that its largest buffer is about as large as the device likes."""
    return max(1, _CHUNK_BYTES.get(device.type, _OTHER_CHUNK_BYTES) // bytes_per_query)


def default_scale(q: Tensor, scale: float | None) -> float:
    """The factor of the scores."""
    return q.shape[-1] ** -0.5 if scale is None else scale
