"""The one type that travels from the data to the model."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Target of a token whose prediction is not scored."""


class PackedBatch(NamedTuple):
    """Documents laid end to end; attention never crosses a boundary of `cu_seqlens`."""

    tokens: Tensor  # int64 [T]
    targets: Tensor  # int64 [T], the next token; IGNORE_INDEX at each document's last token
    positions: Tensor  # int64 [T], restarts at 0 with each document
    cu_seqlens: Tensor  # int32 [N + 1]
    max_seqlen: int  # an upper bound on the longest document's length
    target_bytes: Tensor  # int64 [N], UTF-8 bytes that the scored targets of each document stand for


def allocate_flat(num_tokens: int, num_documents: int, max_seqlen: int) -> Tensor:
    """Memory for a batch as one tensor, for between processes every tensor costs as much as 100,000 tokens.

    int64: tokens, targets, positions, target_bytes, cu_seqlens (int32), T, N, max_seqlen. The memory is numpy's: torch
    aligns its own, which glibc is slow to use again, and a worker with long sequences would grow by hundreds of MB.
    """
    flat = torch.from_numpy(np.empty(_flat_size(num_tokens, num_documents), dtype=np.int64))
    flat[-3:] = torch.tensor([num_tokens, num_documents, max_seqlen])
    return flat


def view_flat(flat: Tensor) -> PackedBatch:
    """The batch at the end of such tensors; its fields share their memory."""
    num_tokens, num_documents, max_seqlen = flat[-3:].tolist()
    flat = flat[-_flat_size(num_tokens, num_documents) :]
    tokens, targets, positions = flat[: 3 * num_tokens].view(3, num_tokens)
    target_bytes = flat[3 * num_tokens : 3 * num_tokens + num_documents]
    cu_seqlens = flat[3 * num_tokens + num_documents : -3].view(torch.int32)[: num_documents + 1]
    return PackedBatch(tokens, targets, positions, cu_seqlens, max_seqlen, target_bytes)


def view_flats(flats: Tensor) -> list[PackedBatch]:
    """All batches of such tensors that were joined end to end."""
    batches: list[PackedBatch] = []
    while len(flats):
        batches.append(view_flat(flats))
        flats = flats[: -_flat_size(len(batches[-1].tokens), len(batches[-1].cu_seqlens) - 1)]
    return batches[::-1]


def _flat_size(num_tokens: int, num_documents: int) -> int:
    return 3 * num_tokens + num_documents + (num_documents + 2) // 2 + 3
