"""Stage 3: choose for each query and group of heads the blocks it attends to (arXiv:2502.11089, eq. 8-11)."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.eager.chunks import default_scale
from nsa_kernels.eager.compressed_attention import visible_compressed_rows
from nsa_kernels.eager.softmax import masked_scores
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import compressed_layout, document_index, document_positions, selection_layout
from nsa_kernels.precision import computed_as_given

# T packed tokens, H_kv KV heads, D head dim, n selected blocks; c queries of a chunk, N summaries that they see,
# J selection blocks that they rank.


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
    runs = visible_compressed_rows(cu_seqlens, config, num_tokens, len(compressed_k), 4 * q.shape[1])
    columns, weights = _importance_columns(cu_seqlens, config, num_tokens)
    layout = selection_layout(cu_seqlens, num_tokens, config)
    first = layout.cu_blocks[document_index(cu_seqlens, num_tokens)]
    own = document_positions(cu_seqlens, num_tokens) // config.select_block_size
    block_indices = first.new_empty(num_tokens, num_kv_heads, config.num_selected_blocks, dtype=torch.int32)
    for queries, keys, hidden in runs:
        scores = masked_scores(
            runs.query_rows(q[queries], num_kv_heads).to(lse.dtype) * default_scale(q, scale),
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
