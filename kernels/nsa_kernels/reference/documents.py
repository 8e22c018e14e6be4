"""Where documents and their compression blocks lie, one by one."""
# N documents, l tokens in a compression block, d its stride.
# t: position of a query in its document; i compression block.
# ruff: noqa: E741 - l is the paper's letter for the tokens of a compression block

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from nsa_kernels.geometry import NSAConfig


def documents(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    """First token and end of each document."""
    return pairwise(cu_seqlens.tolist())


def documents_with_blocks(cu_seqlens: Tensor, config: NSAConfig) -> Iterator[tuple[int, int, int]]:
    """First token, end and first compressed row of each document."""
    first_block = 0
    for start, end in documents(cu_seqlens):
        yield start, end, first_block
        first_block += num_compressed_blocks(end - start, config)


def num_compressed_blocks(length: int, config: NSAConfig) -> int:
    """N_c(L) = (L - l) // d + 1 for L >= l, else 0."""
    l, d = config.compress_block_size, config.compress_stride
    return (length - l) // d + 1 if length >= l else 0


def visible_blocks(t: int, length: int, config: NSAConfig) -> list[int]:
    """The compression blocks that lie wholly in the past or present of query t."""
    l, d = config.compress_block_size, config.compress_stride
    return [i for i in range(num_compressed_blocks(length, config)) if i * d + l - 1 <= t]
