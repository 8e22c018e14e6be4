"""How much arithmetic a training step needs: the count behind model FLOPs utilisation (MFU)."""

import numpy as np
from nsa_kernels import NSAConfig
from numpy.typing import NDArray
from torch import nn

from nsa_lightning.model.attention import AttentionKind, BlockSummary
from nsa_lightning.model.transformer import Transformer, TransformerConfig

Lengths = NDArray[np.int64]  # tokens of each document, [N]


def training_flops(model: Transformer, lengths: Lengths) -> int:
    """FLOPs of forward and backward over documents of these lengths.

    Every weight of a linear layer costs 6 FLOPs a token: a multiplication and an addition, forward and twice
    backward; every visible query-key pair the same for each of its D_qk + D_v dimensions and each head. Block
    summaries count once a block. Recomputation, norms, softmax and the ranking of blocks are left out, as is usual.
    """
    config, shape = model.config, model.config.layer_shape
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    summaries = sum(module.multiplied_weights for module in model.modules() if isinstance(module, BlockSummary))
    pairs = sum(int(visible_pairs(config, kind, lengths).sum()) for kind in config.layer_attention)
    pair_dims = shape.num_heads * (shape.head_dim + shape.value_head_dim)
    num_blocks = int(num_summaries(config.nsa, lengths).sum())
    return 6 * (linear * int(lengths.sum()) + summaries * num_blocks + pair_dims * pairs)


def visible_pairs(config: TransformerConfig, kind: AttentionKind, lengths: Lengths) -> Lengths:
    """Query-key pairs that one head of a layer of this kind computes in each document, [N]."""
    if kind == "full":
        return _causal_pairs(lengths)
    if kind == "sliding":
        return _window_pairs(lengths, config.sliding_window)
    nsa = config.nsa
    return _compressed_pairs(nsa, lengths) + _selected_pairs(nsa, lengths) + _window_pairs(lengths, nsa.window_size)


def num_summaries(nsa: NSAConfig, lengths: Lengths) -> Lengths:
    """Complete compression blocks of each document, [N]."""
    return np.maximum((lengths - nsa.compress_block_size) // nsa.compress_stride + 1, 0)


def _causal_pairs(lengths: Lengths) -> Lengths:
    return lengths * (lengths + 1) // 2


def _window_pairs(lengths: Lengths, window_size: int) -> Lengths:
    inside = np.minimum(lengths, window_size)
    return _causal_pairs(inside) + (lengths - inside) * window_size


def _compressed_pairs(nsa: NSAConfig, lengths: Lengths) -> Lengths:
    """Block i is seen by the L - (i·d + l - 1) queries from its last token on."""
    count = num_summaries(nsa, lengths)
    return count * (lengths - nsa.compress_block_size + 1) - nsa.compress_stride * count * (count - 1) // 2


def _selected_pairs(nsa: NSAConfig, lengths: Lengths) -> Lengths:
    """Full attention up to n·l' tokens; from there n - 1 whole blocks and the query's own up to itself."""
    size = nsa.select_block_size
    dense = np.minimum(lengths, nsa.selected_tokens)
    sparse = lengths - dense
    own = sparse // size * (size * (size + 1) // 2) + _causal_pairs(sparse % size)
    return _causal_pairs(dense) + sparse * (nsa.num_selected_blocks - 1) * size + own
