"""How many query-key pairs attention computes in documents of given lengths, by the patterns that kinds are made of."""

import numpy as np
from nsa_kernels import NSAConfig

from nsa_lightning.model.attention.base import Lengths


def causal_pairs(lengths: Lengths) -> Lengths:
    """Every token with itself and all before it, [N]."""
    return lengths * (lengths + 1) // 2


def window_pairs(lengths: Lengths, window_size: int) -> Lengths:
    """Every token with itself and the `window_size` - 1 before it, [N]."""
    inside = np.minimum(lengths, window_size)
    return causal_pairs(inside) + (lengths - inside) * window_size


def num_summaries(nsa: NSAConfig, lengths: Lengths) -> Lengths:
    """Complete compression blocks of each document, [N]."""
    return np.maximum((lengths - nsa.compress_block_size) // nsa.compress_stride + 1, 0)


def compressed_pairs(nsa: NSAConfig, lengths: Lengths) -> Lengths:
    """Block i is seen by the L - (i·d + l - 1) queries from its last token on, [N]."""
    count = num_summaries(nsa, lengths)
    return count * (lengths - nsa.compress_block_size + 1) - nsa.compress_stride * count * (count - 1) // 2


def selected_pairs(nsa: NSAConfig, lengths: Lengths) -> Lengths:
    """Full attention up to n·l' tokens; from there n - 1 whole blocks and the query's own up to itself, [N]."""
    size = nsa.select_block_size
    dense = np.minimum(lengths, nsa.selected_tokens)
    sparse = lengths - dense
    own = sparse // size * (size * (size + 1) // 2) + causal_pairs(sparse % size)
    return causal_pairs(dense) + sparse * (nsa.num_selected_blocks - 1) * size + own
