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


def compressed_layout(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> CompressedLayout:
    """Lay out every complete compression block; a document of L tokens has (L - l) // d + 1 of them, or none.

    The number of rows is C = max(T // d, 1): no packing of T tokens has more blocks.
    """
    offsets = cu_seqlens.long()
    lengths = offsets.diff()
    block_size, stride = config.compress_block_size, config.compress_stride
    counts = torch.where(lengths >= block_size, (lengths - block_size) // stride + 1, 0)
    cu_blocks = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(max(num_tokens // stride, 1), device=cu_seqlens.device)
    is_block = rows < cu_blocks[-1]
    document = torch.where(is_block, torch.searchsorted(cu_blocks[1:], rows, right=True), 0)
    block = torch.where(is_block, rows - cu_blocks[document], 0)
    return CompressedLayout(cu_blocks, document, block, is_block)


def compressed_block_centres(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> Tensor:
    """The position in its document of each compression block's centre token, i·d + l // 2, int64 [C].

    A block summary is rotated (RoPE) at this position. Unused rows hold the centre of block 0.
    """
    layout = compressed_layout(cu_seqlens, num_tokens, config)
    return layout.block * config.compress_stride + config.compress_block_size // 2


class SelectionLayout(NamedTuple):
    """The selection blocks of a packed batch, each padded to l' slots: document after document, then unused rows."""

    cu_blocks: Tensor  # int64 [N + 1], rows before each document
    document: Tensor  # int64 [B], 0 in unused rows
    block: Tensor  # int64 [B], index of the block in its document, 0 in unused rows
    is_block: Tensor  # bool [B], False in unused rows


def selection_layout(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> SelectionLayout:
    """Lay out every selection block, the last and shorter one of each document included.

    The number of rows is B = T // l' + N: no packing of T tokens in N documents has more blocks.
    """
    offsets = cu_seqlens.long()
    size = config.select_block_size
    counts = (offsets.diff() + size - 1) // size
    cu_blocks = torch.cat([offsets.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(num_tokens // size + len(cu_seqlens) - 1, device=cu_seqlens.device)
    is_block = rows < cu_blocks[-1]
    document = torch.where(is_block, torch.searchsorted(cu_blocks[1:], rows, right=True), 0)
    block = torch.where(is_block, rows - cu_blocks[document], 0)
    return SelectionLayout(cu_blocks, document, block, is_block)
