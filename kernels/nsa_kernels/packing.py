"""Where documents and their blocks lie in a packed batch.

Documents stand end to end; `cu_seqlens` [N + 1] holds their offsets. Everything here is computed on the device of
`cu_seqlens` without reading a value back to the host, so sizes that depend on the documents are upper bounds that
depend on `T` and `N` alone; rows past the last real block are marked and hold nothing.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.geometry import NSAConfig

# T packed tokens, N documents, C rows for compressed blocks, B rows for selection blocks.


def document_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The document of each packed token, int64 [T]."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), tokens, right=True)


def document_positions(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The position of each packed token in its document, int64 [T], from 0."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    return tokens - cu_seqlens.long()[document_index(cu_seqlens, num_tokens)]


class CompressedLayout(NamedTuple):
    """The compression blocks of a packed batch: document after document, then unused rows."""

    cu_blocks: Tensor  # int64 [N + 1], rows before each document
    document: Tensor  # int64 [C], 0 in unused rows
    block: Tensor  # int64 [C], index of the block in its document, 0 in unused rows
    is_block: Tensor  # bool [C], False in unused rows
    start: Tensor  # int64 [C], first token of the block, 0 in unused rows


def compressed_layout(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> CompressedLayout:
    """Lay out every complete compression block; a document of L tokens has (L - l) // d + 1 of them, or none.

    The number of rows is C = max(T // d, 1): no packing of T tokens has more blocks.
    """
    config, offsets = config.within(num_tokens), cu_seqlens.long()
    lengths = offsets.diff()
    block_size, stride = config.compress_block_size, config.compress_stride
    counts = torch.where(lengths >= block_size, (lengths - block_size) // stride + 1, 0)
    cu_blocks = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(max(num_tokens // stride, 1), device=cu_seqlens.device)
    is_block = rows < cu_blocks[-1]
    document = torch.where(is_block, torch.searchsorted(cu_blocks[1:], rows, right=True), 0)
    block = torch.where(is_block, rows - cu_blocks[document], 0)
    return CompressedLayout(cu_blocks, document, block, is_block, offsets[document] + block * stride)


def visible_summaries(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """The compressed rows that each token sees, from `first` to before `end`, int64 [T] each.

    They are the blocks that lie wholly in its past or present.
    """
    config = config.within(num_tokens)
    first = compressed_layout(cu_seqlens, num_tokens, config).cu_blocks[document_index(cu_seqlens, num_tokens)]
    past = document_positions(cu_seqlens, num_tokens) + 1 - config.compress_block_size
    return first, first + (past.div(config.compress_stride, rounding_mode="floor") + 1).clamp(min=0)


def compressed_block_centres(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> Tensor:
    """The position in its document of each compression block's centre token, i·d + l // 2, int64 [C].

    A block summary is rotated (RoPE) at this position. Unused rows hold the centre of block 0.
    """
    config = config.within(num_tokens)
    layout = compressed_layout(cu_seqlens, num_tokens, config)
    return layout.block * config.compress_stride + config.compress_block_size // 2


class SelectionLayout(NamedTuple):
    """The selection blocks of a packed batch, each padded to l' slots: document after document, then unused rows."""

    cu_blocks: Tensor  # int64 [N + 1], rows before each document
    document: Tensor  # int64 [B], 0 in unused rows
    block: Tensor  # int64 [B], index of the block in its document, 0 in unused rows
    is_block: Tensor  # bool [B], False in unused rows
    start: Tensor  # int64 [B], first token of the block, 0 in unused rows


def selection_layout(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> SelectionLayout:
    """Lay out every selection block, the last and shorter one of each document included.

    The number of rows is B = T // l' + N: no packing of T tokens in N documents has more blocks.
    """
    config, offsets = config.within(num_tokens), cu_seqlens.long()
    size = config.select_block_size
    counts = (offsets.diff() + size - 1) // size
    cu_blocks = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(num_tokens // size + len(cu_seqlens) - 1, device=cu_seqlens.device)
    is_block = rows < cu_blocks[-1]
    document = torch.where(is_block, torch.searchsorted(cu_blocks[1:], rows, right=True), 0)
    block = torch.where(is_block, rows - cu_blocks[document], 0)
    return SelectionLayout(cu_blocks, document, block, is_block, offsets[document] + block * size)


class KeyRuns(NamedTuple):
    """Which keys each query sees, one run of them, and which queries see each key; int32.

    `first` and `end` ascend from query to query.
    """

    first: Tensor  # [T]
    end: Tensor  # [T]
    seen_from: Tensor  # [S], T for a key that no query sees
    seen_to: Tensor  # [S], 0 for a key that no query sees


def sliding_runs(document_start: Tensor, document_end: Tensor, window_size: int) -> KeyRuns:
    """The last `window_size` tokens of its document for each token, its own included."""
    token = torch.arange(document_start.shape[0], device=document_start.device, dtype=torch.int32)
    window_size = min(window_size, torch.iinfo(torch.int32).max)
    first = torch.maximum(token - (window_size - 1), document_start)
    seen_to = token + (document_end - token).clamp(max=window_size)  # no sum is above the end
    return KeyRuns(first, token + 1, token, seen_to)


class BatchLayout(NamedTuple):
    """Where everything lies that the kernels read, int32; made once for all layers of a batch."""

    document_start: Tensor  # [T], first token of each token's document
    document_end: Tensor  # [T]
    first_summary: Tensor  # [T], compressed row of its document's first block
    end_summary: Tensor  # [T], end of the compressed rows that the token sees
    summary_start: Tensor  # [C], first token that a compressed row summarises; T in unused rows
    summary_from: Tensor  # [C], first token that sees the row; T in unused rows
    summary_to: Tensor  # [C], end of the tokens that see it; 0 in unused rows
    first_block: Tensor  # [T], selection row of its document's first block
    block_start: Tensor  # [B], first token of a selection row; T in unused rows
    block_end: Tensor  # [B], T in unused rows
    window_first: Tensor  # [T], and so on: the runs of the sliding branch
    window_end: Tensor  # [T]
    window_from: Tensor  # [T]
    window_to: Tensor  # [T]

    @property
    def compressed_runs(self) -> KeyRuns:
        """The compressed rows that each token sees."""
        return KeyRuns(self.first_summary, self.end_summary, self.summary_from, self.summary_to)

    @property
    def sliding_runs(self) -> KeyRuns:
        """The tokens in each token's window."""
        return KeyRuns(self.window_first, self.window_end, self.window_from, self.window_to)


def batch_layout(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> BatchLayout:
    """Lay out a packed batch of documents for the attention kernels.

    Args:
        cu_seqlens: document offsets, integers [N + 1].
        num_tokens: T.
        config: block sizes.
    """
    config, offsets = config.within(num_tokens), cu_seqlens.long()
    document = document_index(cu_seqlens, num_tokens)
    document_start, document_end = offsets[document].int(), offsets[document + 1].int()
    first_summary, end_summary = visible_summaries(cu_seqlens, num_tokens, config)
    summaries = compressed_layout(cu_seqlens, num_tokens, config)
    summary_from = summaries.start + config.compress_block_size - 1
    blocks = selection_layout(cu_seqlens, num_tokens, config)
    block_end = torch.minimum(blocks.start + config.select_block_size, offsets[blocks.document + 1])
    return BatchLayout(
        document_start,
        document_end,
        first_summary.int(),
        end_summary.int(),
        summaries.start.where(summaries.is_block, num_tokens).int(),
        summary_from.where(summaries.is_block, num_tokens).int(),
        offsets[summaries.document + 1].where(summaries.is_block, 0).int(),
        blocks.cu_blocks[document].int(),
        blocks.start.where(blocks.is_block, num_tokens).int(),
        block_end.where(blocks.is_block, num_tokens).int(),
        *sliding_runs(document_start, document_end, config.window_size),
    )
