"""Native Sparse Attention in plain PyTorch: what a CPU trains on, and any device without Triton.

Same stages, names and results as `reference.py`, but vectorised and with bounded memory. Queries are processed a
chunk at a time, forward saves the inputs, the output and the log-sum-exp, and backward recomputes each chunk's
probabilities from them: beside its inputs and outputs a stage holds one chunk of scores. Scores, softmax and
gradients are computed in float32 (float64 for float64 inputs), whatever autocast says.

Infinity and NaN reach those that see them and no others. A matrix product does not know who sees what, and 0 times
infinity is NaN: such numbers are taken out of it, and NaN is put where they belong.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.packing import (
    compressed_layout,
    document_index,
    document_positions,
    selection_layout,
    visible_summaries,
)
from nsa_kernels.precision import computed_as_given, linear_map, without_autocast

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv, D head dim, C rows of compressed blocks, n selected
# blocks, l' tokens in one of them. Inside a chunk: B independent problems of M query rows and N keys each.

_CHUNK_BYTES = {"cpu": 2**21}
_OTHER_CHUNK_BYTES = 2**28
"""Size of a chunk's largest buffer: what a CPU core caches, and what keeps an accelerator busy."""


def _scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """q @ k of scaled queries, [B, M, N], -inf where `hidden` (broadcast) is True."""
    return torch.bmm(q, k.mT).masked_fill_(hidden, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, watchful: bool | None = None) -> tuple[Tensor, Tensor]:
    """Softmax attention: q [B, M, D], k [B, N, D], v [B, N, D_v] -> o [B, M, D_v], lse [B, M]; no key gives 0, 0.

    `watchful` says whether v may hold infinity or NaN, where the caller has looked.
    """
    scores = _scores(q, k, hidden)
    row_max = scores.amax(-1, keepdim=True)
    row_max = row_max.masked_fill(row_max == float("-inf"), 0.0)
    p = scores.sub_(row_max).exp_()
    row_sum = p.sum(-1, keepdim=True)
    seen = row_sum != 0
    watchful = may_be_infinite(v) if watchful is None else watchful
    o = torch.bmm(p, _without(v, v.isfinite()) if watchful else v).div_(row_sum.masked_fill(~seen, 1.0))
    if watchful:
        spoilt = ~(hidden | v.isfinite().all(-1).unsqueeze(1))
        o.masked_fill_(spoilt.any(-1, keepdim=True), float("nan"))
    lse = torch.where(seen, row_max + row_sum.log(), 0.0)
    return o, lse.squeeze(-1)


def _attend_backward(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, lse: Tensor, delta: Tensor, grad_o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from the saved lse [B, M, 1] and delta = sum(o * grad_o) [B, M, 1]."""
    p = _scores(q, k, hidden).sub_(lse).exp_()
    grad_v = torch.bmm(p.mT, grad_o)
    grad_scores = torch.bmm(grad_o, v.mT).sub_(delta).mul_(p)
    return torch.bmm(grad_scores, k), torch.bmm(grad_scores.mT, q), grad_v


def _attend_backward_of_finite_pairs(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, lse: Tensor, delta: Tensor, grad_o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`_attend_backward` where some numbers are not finite; a row without a gradient gives none."""
    active = (grad_o != 0).any(-1, keepdim=True)  # [B, M, 1]
    weighs = q.isfinite().all(-1, keepdim=True) & lse.isfinite() & grad_o.isfinite().all(-1, keepdim=True)
    scored = weighs & delta.isfinite()
    known, key = k.isfinite().all(-1).unsqueeze(1), v.isfinite().all(-1).unsqueeze(1)  # [B, 1, N]
    seen = ~hidden & active
    spoilt_p, spoilt_scores = seen & ~(weighs & known), seen & ~(scored & known & key)  # [B, M, N]
    q, k, v, grad_o = (_without(x, x.isfinite()) for x in (q, k, v, grad_o))
    p = _scores(q, k, hidden).sub_(_without(lse, lse.isfinite())).exp_()
    p.masked_fill_(hidden | ~(active & weighs) | ~known, 0.0)
    grad_v = torch.bmm(p.mT, grad_o)
    p.masked_fill_(~(scored & key), 0.0)
    grad_scores = torch.bmm(grad_o, v.mT).sub_(_without(delta, delta.isfinite())).mul_(p)
    nan, queries, keys = float("nan"), spoilt_scores.any(-1, keepdim=True), spoilt_scores.any(1).unsqueeze(-1)
    return (
        torch.bmm(grad_scores, k).masked_fill_(queries, nan),
        torch.bmm(grad_scores.mT, q).masked_fill_(keys, nan),
        grad_v.masked_fill_(spoilt_p.any(1).unsqueeze(-1), nan),
    )


def may_be_infinite(x: Tensor) -> bool:
    """Whether to look for infinity and NaN: a CPU knows by the sum, for another device the host would wait."""
    return x.device.type != "cpu" or not bool(x.sum().isfinite())


def _without(x: Tensor, finite: Tensor) -> Tensor:
    return x.where(finite, 0.0)


@dataclass(frozen=True)
class _KeyRuns:
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
        return hidden.repeat_interleave(group_size, dim=0)  # [c * G, N]

    def take(self, x: Tensor, keys: Any) -> Tensor:
        return x[keys].transpose(0, 1)  # [H_kv, N, D]

    def add(self, total: Tensor, keys: Any, part: Tensor) -> None:
        total[keys] += part.transpose(0, 1)


@dataclass(frozen=True)
class _KeyBlocks:
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
        return hidden.unsqueeze(1)  # [c * H_kv, 1, n * l']

    def take(self, x: Tensor, keys: Any) -> Tensor:
        blocks = x.index_select(0, keys)  # [c * H_kv * n, l', D]
        return blocks.view(-1, self.rows.shape[-1] * self.block_size, x.shape[-1])

    def add(self, total: Tensor, keys: Any, part: Tensor) -> None:
        total.index_add_(0, keys, part.reshape(-1, *total.shape[1:]))


class _ChunkedAttention(torch.autograd.Function):
    """o, lse of softmax attention, computed and differentiated one chunk of queries at a time."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, num_kv_heads: int, scale: float, chunks: _KeyRuns | _KeyBlocks
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(q):
            return _ChunkedAttention._forward(ctx, q, k, v, num_kv_heads, scale, chunks)

    @staticmethod
    def _forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, num_kv_heads: int, scale: float, chunks: _KeyRuns | _KeyBlocks
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
        with without_autocast(grad_o):
            return _ChunkedAttention._backward(ctx, grad_o)

    @staticmethod
    def _backward(ctx: Any, grad_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        num_kv_heads, scale, chunks = ctx.num_kv_heads, ctx.scale, ctx.chunks
        dtype = lse.dtype
        grad_q = torch.empty_like(q)
        grad_k, grad_v = torch.zeros_like(k, dtype=dtype), torch.zeros_like(v, dtype=dtype)
        delta = (o.to(dtype) * grad_o.to(dtype)).sum(-1)  # [T, H]
        watchful = any(map(may_be_infinite, (q, k, v, lse, delta, grad_o)))
        attend_backward = _attend_backward_of_finite_pairs if watchful else _attend_backward
        for queries, keys, hidden in chunks:
            num_queries = queries.stop - queries.start
            q_part, k_part, v_part = attend_backward(
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


def _chunk_size(device: torch.device, bytes_per_query: int) -> int:
    """Queries a chunk, so that its largest buffer is about as large as the device likes."""
    return max(1, _CHUNK_BYTES.get(device.type, _OTHER_CHUNK_BYTES) // bytes_per_query)


def _default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def compress(x: Tensor, cu_seqlens: Tensor, config: NSAConfig, weights: CompressionWeights | None = None) -> Tensor:
    """Summarise each block of keys or values: φ(x) = mean(x) + f(x + e), x [T, H_kv, D] -> [C, H_kv, D].

    See `reference.compress`. Rows past the last block are zero.
    """
    config = config if weights is not None else config.within(len(x))
    layout = compressed_layout(cu_seqlens, len(x), config)
    tokens = layout.start[:, None] + torch.arange(config.compress_block_size, device=x.device)  # [C, l]
    tokens = tokens.where(layout.is_block[:, None], 0)
    blocks = x.index_select(0, tokens.flatten()).view(*tokens.shape, *x.shape[1:])  # [C, l, H_kv, D]
    return summarise(blocks, weights).where(layout.is_block[:, None, None], 0.0)


def summarise(blocks: Tensor, weights: CompressionWeights | None = None) -> Tensor:
    """φ of blocks of keys or values that are gathered already, [C, l, H_kv, D] -> [C, H_kv, D]."""
    summary = blocks.mean(1, dtype=torch.promote_types(blocks.dtype, torch.float32))  # [C, H_kv, D]
    if weights is not None:
        inputs = blocks.permute(2, 0, 1, 3) + weights.position_embedding.unsqueeze(1)  # [H_kv, C, l, D]
        mapped = linear_map(inputs.flatten(2), weights.in_weight) + weights.in_bias.unsqueeze(1)
        if weights.out_weight is not None and weights.out_bias is not None:
            mapped = linear_map(mapped, weights.out_weight, activated=True) + weights.out_bias.unsqueeze(1)
        summary = summary + mapped.transpose(0, 1)
    return summary.to(blocks.dtype)


def _visible_compressed_rows(
    cu_seqlens: Tensor, config: NSAConfig, num_tokens: int, num_rows: int, bytes_per_score: int
) -> _KeyRuns:
    """The compressed rows each query sees: whole blocks in its past or present."""
    first, end = visible_summaries(cu_seqlens, num_tokens, config)
    chunk = _chunk_size(cu_seqlens.device, num_rows * bytes_per_score)
    chunks = []
    for start in range(0, num_tokens, chunk):
        queries = slice(start, min(start + chunk, num_tokens))
        if cu_seqlens.device.type == "cpu":  # reading a bound costs nothing here
            low, high = int(first[queries].min()), int(end[queries].max())
        else:
            low, high = 0, queries.stop // config.compress_stride
        low = min(low, num_rows - 1)
        chunks.append((queries, slice(low, min(max(high, low + 1), num_rows))))
    return _KeyRuns(first, end, chunks)


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the visible block summaries; see `reference.compressed_attention`."""
    config = config.within(len(q))
    runs = _visible_compressed_rows(cu_seqlens, config, len(q), len(compressed_k), 4 * q.shape[1])
    return _ChunkedAttention.apply(q, compressed_k, compressed_v, compressed_k.shape[1], _default_scale(q, scale), runs)


class Candidates(NamedTuple):
    """Which selection blocks, as rows of the selection layout, a chunk of queries ranks."""

    rows: Tensor  # int64 [J]
    first: Tensor  # int64 [c], row of the first block of each query's document
    own: Tensor  # int64 [c], the query's own block, counted in its document


def _importance_columns(cu_seqlens: Tensor, config: NSAConfig, num_tokens: int) -> tuple[Tensor, Tensor]:
    """For each selection block the compressed rows that overlap it, int64 [B, K], -1 for none; and their weights [K].

    Summing p over the chunks of a block and the compression blocks that cover each chunk counts compression block
    j·l'/d - (l/d - 1) + k as often as windows of l/d and l'/d chunks overlap at offset k.
    """
    per_block, per_summary = (
        config.select_block_size // config.compress_stride,
        config.compress_block_size // config.compress_stride,
    )
    width = per_block + per_summary - 1
    offset = torch.arange(width, device=cu_seqlens.device)
    weights = torch.minimum(offset, width - 1 - offset).add_(1).clamp_(max=min(per_block, per_summary))
    summaries = compressed_layout(cu_seqlens, num_tokens, config)
    blocks = selection_layout(cu_seqlens, num_tokens, config)
    index = blocks.block[:, None] * per_block - (per_summary - 1) + offset  # [B, K], in the document
    count = summaries.cu_blocks.diff()[blocks.document, None]
    exists = (index >= 0) & (index < count) & blocks.is_block[:, None]
    return (summaries.cu_blocks[blocks.document, None] + index).where(exists, -1), weights


def rank(importance: Tensor, candidates: Candidates, config: NSAConfig) -> Tensor:
    """The n blocks of each query, int32 [c, H_kv, n] ascending then -1, from importance [H_kv, c, J]."""
    block = candidates.rows - candidates.first[:, None]  # [c, J], in the document
    own = candidates.own[:, None]
    exists = (block >= 0) & (block <= own)
    forced = (block < config.num_init_blocks) | (block > own - config.num_local_blocks)
    score = importance.masked_fill(forced, float("inf")).masked_fill(~exists, float("-inf"))
    score, order = score.sort(dim=-1, descending=True, stable=True)  # stable: ties to the lower index
    n = config.num_selected_blocks
    chosen = block.expand_as(score).gather(-1, order[..., :n])
    empty = torch.iinfo(torch.int64).max
    chosen = chosen.masked_fill(score[..., :n] == float("-inf"), empty).sort(-1).values
    chosen = chosen.masked_fill(chosen == empty, -1)
    return torch.nn.functional.pad(chosen, (0, n - chosen.shape[-1]), value=-1).transpose(0, 1).int()


@torch.no_grad()
@computed_as_given
def block_selection(
    q: Tensor,
    compressed_k: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> Tensor:
    """Choose the n selection blocks of each query, int32 [T, H_kv, n]; see `reference.block_selection`."""
    num_tokens, num_kv_heads, config = len(q), compressed_k.shape[1], config.within(len(q))
    runs = _visible_compressed_rows(cu_seqlens, config, num_tokens, len(compressed_k), 4 * q.shape[1])
    columns, weights = _importance_columns(cu_seqlens, config, num_tokens)
    layout = selection_layout(cu_seqlens, num_tokens, config)
    first = layout.cu_blocks[document_index(cu_seqlens, num_tokens)]
    own = document_positions(cu_seqlens, num_tokens) // config.select_block_size
    block_indices = first.new_empty(num_tokens, num_kv_heads, config.num_selected_blocks, dtype=torch.int32)
    for queries, keys, hidden in runs:
        scores = _scores(
            runs.query_rows(q[queries], num_kv_heads).to(lse.dtype) * _default_scale(q, scale),
            runs.take(compressed_k, keys).to(lse.dtype),
            runs.for_rows(hidden, q.shape[1] // num_kv_heads),
        )
        p = scores.sub_(runs.query_rows(lse[queries, :, None], num_kv_heads)).exp_()
        p = p.unflatten(1, (queries.stop - queries.start, -1)).sum(2)  # [H_kv, c, N]
        if cu_seqlens.device.type == "cpu":
            low, high = int(first[queries].min()), int((first + own)[queries].max()) + 1
        else:
            low, high = 0, len(columns)
        inside = (columns[low:high] >= keys.start) & (columns[low:high] < keys.stop)
        column = (columns[low:high] - keys.start).where(inside, p.shape[-1])  # the last one, which holds 0
        p = torch.nn.functional.pad(p, (0, 1))
        importance = p[..., column] @ weights.to(p.dtype)  # [H_kv, c, J]
        rows = torch.arange(low, high, device=q.device)
        block_indices[queries] = rank(importance, Candidates(rows, first[queries], own[queries]), config)
    return block_indices


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the tokens of its selected blocks; see `reference.selected_attention`."""
    (num_tokens, num_kv_heads), config = k.shape[:2], config.within(len(k))
    size, slots = config.select_block_size, -(-num_tokens // config.select_block_size)
    layout = selection_layout(cu_seqlens, num_tokens, config)
    tokens = (layout.start[:, None] + torch.arange(size, device=q.device)).clamp(max=num_tokens - 1)  # [B, l']

    def as_blocks(x: Tensor) -> Tensor:  # [T, H_kv, D] -> [H_kv * B, l', D]
        return x.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).permute(2, 0, 1, 3).flatten(0, 1)

    position = document_positions(cu_seqlens, num_tokens)[:, None, None]
    chosen = block_indices[..., :slots].long()
    first = layout.cu_blocks[document_index(cu_seqlens, num_tokens)][:, None, None]
    head_rows = torch.arange(num_kv_heads, device=q.device)[:, None] * len(layout.block)
    rows = (first + chosen.clamp(min=0)) + head_rows  # [T, H_kv, n]
    visible = (position + 1 - chosen * size).clamp(max=size).where(chosen >= 0, 0)
    bytes_per_query = 4 * num_kv_heads * chosen.shape[-1] * size * max(q.shape[-1], q.shape[1] // num_kv_heads)
    blocks = _KeyBlocks(rows, visible, size, _chunk_size(q.device, bytes_per_query))
    return _ChunkedAttention.apply(q, as_blocks(k), as_blocks(v), num_kv_heads, _default_scale(q, scale), blocks)


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend each query to the last `window_size` tokens, its own included; see `reference.sliding_attention`."""
    num_tokens = len(q)
    token = torch.arange(num_tokens, device=q.device)
    document_start = cu_seqlens.long()[document_index(cu_seqlens, num_tokens)]
    first = torch.maximum(token - window_size + 1, document_start)
    bytes_per_query = 4 * q.shape[1] * min(2 * window_size, num_tokens)
    chunk = min(_chunk_size(q.device, bytes_per_query), max(window_size, 16))
    chunks = []
    for start in range(0, num_tokens, chunk):
        queries = slice(start, min(start + chunk, num_tokens))
        chunks.append((queries, slice(max(start - window_size + 1, 0), queries.stop)))
    runs = _KeyRuns(first, token + 1, chunks)
    return _ChunkedAttention.apply(q, k, v, k.shape[1], _default_scale(q, scale), runs)
