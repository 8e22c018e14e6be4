"""How fast each stage could be: its counted work over rates measured on the same device.

    floor = max(FLOPs / matmul rate, bytes / copy rate)

FLOPs are matrix products over the (query, key) pairs that a stage must score, two of them forward (scores and output)
and five backward; bytes are every input read and every output written once. Exponentials, masks, ranking and loads
that repeat are not in it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from nsa_kernels import NSAConfig
from nsa_kernels.packing import document_positions
from torch import Tensor

from nsa_lightning.benchmark.cases import Shape
from nsa_lightning.benchmark.timing import Ceilings
from nsa_lightning.model.attention.pairs import compressed_pairs, num_summaries, window_pairs

# T packed tokens, H query heads, H_kv KV heads, G = H / H_kv, D_qk and D_v head dims, C compressed blocks.

LSE_BYTES = INDEX_BYTES = 4


class Work(NamedTuple):
    """What one direction of one stage must do."""

    flops: float
    num_bytes: float


class StageWork(NamedTuple):
    """Forward and backward work of one stage; no backward for the choice of blocks."""

    forward: Work
    backward: Work | None


class Pairs(NamedTuple):
    """(query, key) pairs that the query heads of one layer score, over all heads."""

    compressed: int
    selected: int
    sliding: int


def count_pairs(
    shape: Shape, lengths: list[int], block_indices: Tensor, cu_seqlens: Tensor, config: NSAConfig
) -> Pairs:
    """Exact pairs of each branch.

    Args:
        shape: heads and head dimensions.
        lengths: tokens of each document.
        block_indices: the chosen blocks, int32 [T, H_kv, n], -1 for none.
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes, counts and window.
    """
    documents = np.array(lengths)
    return Pairs(
        compressed=shape.num_heads * int(compressed_pairs(config, documents).sum()),
        selected=shape.group_size * selected_pairs(block_indices, cu_seqlens, config),
        sliding=shape.num_heads * int(window_pairs(documents, config.window_size).sum()),
    )


def selected_pairs(block_indices: Tensor, cu_seqlens: Tensor, config: NSAConfig) -> int:
    """Tokens up to the query's own in its chosen blocks, over all queries and KV heads."""
    position = document_positions(cu_seqlens, len(block_indices))
    total = torch.zeros((), dtype=torch.int64, device=block_indices.device)
    for slot in block_indices.unbind(-1):  # [T, H_kv]
        seen = (position[:, None] + 1 - slot.long() * config.select_block_size).clamp(0, config.select_block_size)
        total += seen.where(slot >= 0, 0).sum()
    return int(total)


def stage_work(
    shape: Shape, lengths: list[int], pairs: Pairs, config: NSAConfig, element_size: int
) -> Mapping[str, StageWork]:
    """Work of every stage of one layer, by the stage's name; `gates` is the gated sum of the three branches."""
    T, (_, H, H_kv, D_qk, D_v) = sum(lengths), shape
    C = int(num_summaries(config, np.array(lengths)).sum())
    queries, outputs = T * H * D_qk * element_size, T * H * D_v * element_size
    token_keys = T * H_kv * (D_qk + D_v) * element_size
    block_keys = C * H_kv * (D_qk + D_v) * element_size
    lse, gates = T * H * LSE_BYTES, 3 * T * H * element_size
    indices = T * H_kv * config.num_selected_blocks * INDEX_BYTES

    def attention(num_pairs: int, keys: int, index_bytes: int = 0) -> StageWork:
        read = queries + keys + index_bytes
        return StageWork(
            Work(2 * num_pairs * (D_qk + D_v), read + outputs + lse),
            Work(2 * num_pairs * (3 * D_qk + 2 * D_v), read + 2 * outputs + lse + queries + keys),
        )

    ranking = Work(2 * pairs.compressed * D_qk, queries + C * H_kv * D_qk * element_size + lse + indices)
    return {
        "compress": StageWork(Work(0, token_keys + block_keys), Work(0, token_keys + block_keys)),
        "compressed_attention": attention(pairs.compressed, block_keys),
        "block_selection": StageWork(ranking, None),
        "selected_attention": attention(pairs.selected, token_keys, indices),
        "sliding_attention": attention(pairs.sliding, token_keys),
        "gates": StageWork(Work(0, 4 * outputs + gates), Work(0, 7 * outputs + 2 * gates)),
    }


def floor_ms(work: Work, ceilings: Ceilings) -> float:
    """The least time this work takes at the measured rates."""
    return 1e3 * max(work.flops / ceilings.matmul_flops, work.num_bytes / ceilings.copy_bytes)
