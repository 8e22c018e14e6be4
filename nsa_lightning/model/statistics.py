"""What the gates and the selection of one NSA layer did on a batch, as sums that add up over layers and ranks."""

from typing import NamedTuple

import torch
from nsa_kernels import NSAConfig
from nsa_kernels.packing import document_positions
from torch import Tensor

NUM_GATE_BINS = 40
"""Equal bins of (0, 1) in which gate scores are counted."""

NUM_DISTANCE_BINS = 24
"""Bins of selection distance: bin i counts blocks 2^i to 2^(i+1) - 1 tokens back."""

NEAR = 0.05
"""A gate below NEAR counts as near 0, one above 1 - NEAR as near 1; a multiple of the bin width."""

# T packed tokens, H query heads, H_kv KV heads, n selected blocks.


class BranchStatistics(NamedTuple):
    """Sums over the tokens of a batch; branches in the order compressed, selected, sliding."""

    gate_sum: Tensor  # float32 [H, 3]
    gate_square_sum: Tensor  # float32 [H, 3]
    gate_histogram: Tensor  # float32 [3, NUM_GATE_BINS], counts over tokens and heads
    distance_sum: Tensor  # float32 [], tokens from a query back to its freely chosen blocks' first tokens
    distance_histogram: Tensor  # float32 [NUM_DISTANCE_BINS]
    beyond_window: Tensor  # float32 [], freely chosen blocks that end before the sliding window starts
    num_tokens: Tensor  # float32 []


@torch.no_grad()
def branch_statistics(gates: Tensor, block_indices: Tensor, cu_seqlens: Tensor, config: NSAConfig) -> BranchStatistics:
    """Summarise gates [T, H, 3] and chosen blocks [T, H_kv, n]; forced blocks are left out of the distances.

    Ranks that share a batch have the gates of some tokens and the blocks of some heads: their sums add up.
    """
    scores = gates.detach().float()
    bins = (scores * NUM_GATE_BINS).long().clamp_(0, NUM_GATE_BINS - 1)  # [T, H, 3]
    bins = bins + torch.arange(3, device=bins.device) * NUM_GATE_BINS
    ones = torch.ones_like(bins)
    gate_histogram = _count(bins.flatten(), ones.flatten(), 3 * NUM_GATE_BINS).unflatten(0, (3, -1))

    positions = document_positions(cu_seqlens, len(block_indices))[:, None, None]
    first_token = block_indices.long() * config.select_block_size  # [T, H_kv, n]
    own_block = positions // config.select_block_size
    forced = (block_indices < config.num_init_blocks) | (block_indices > own_block - config.num_local_blocks)
    free = ~forced  # an empty slot is -1: below num_init_blocks, so counted as forced
    distance = (positions - first_token).clamp(min=1)
    distance_bins = distance.float().log2().long().clamp_(0, NUM_DISTANCE_BINS - 1)
    beyond = first_token + config.select_block_size <= positions + 1 - config.window_size
    return BranchStatistics(
        gate_sum=scores.sum(0),
        gate_square_sum=scores.square().sum(0),
        gate_histogram=gate_histogram,
        distance_sum=(distance * free).sum().float(),
        distance_histogram=_count(distance_bins.flatten(), free.flatten().long(), NUM_DISTANCE_BINS),
        beyond_window=(beyond & free).sum().float(),
        num_tokens=torch.full((), float(len(scores)), device=scores.device),
    )


def _count(bins: Tensor, counts: Tensor, num_bins: int) -> Tensor:
    """Integer counts added up by bin, float32 [num_bins]; unlike torch.bincount, without reading back to the host."""
    return counts.new_zeros(num_bins).index_add_(0, bins, counts).float()
