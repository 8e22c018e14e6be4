import numpy as np
import pytest
import torch

from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.model.attention.pairs import num_summaries
from nsa_lightning.model.config import ATTENTION_KINDS, NSALayerConfig
from nsa_lightning.model.flops import training_flops

NSA = NSALayerConfig(
    kv_sharing="separate",
    branch_start="independent",
    compress_block_size=8,
    compress_stride=4,
    select_block_size=8,
    num_selected_blocks=4,
    window_size=6,
)
CONFIG = TransformerConfig(
    vocab_size=100,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    sliding_window=5,
    nsa=NSA,
)


def counted_pairs(kind, length):
    """Query-key pairs by looking at every query."""
    pairs = 0
    for t in range(length):
        if kind == "full":
            pairs += t + 1
        elif kind == "sliding":
            pairs += min(t + 1, CONFIG.sliding_window)
        else:
            pairs += sum(i * 4 + 8 - 1 <= t for i in range(length))
            own = t // 8
            pairs += (min(4, own + 1) - 1) * 8 + t % 8 + 1
            pairs += min(t + 1, NSA.window_size)
    return pairs


@pytest.mark.parametrize("kind", ["full", "sliding", "nsa"])
def test_pairs_equal_a_count_over_every_query(kind):
    lengths = np.array([0, 1, 5, 6, 7, 8, 31, 32, 33, 40, 77, 100])
    expected = [counted_pairs(kind, length) for length in lengths.tolist()]
    assert ATTENTION_KINDS[kind].visible_pairs(CONFIG, lengths).tolist() == expected


def test_summaries_are_complete_blocks():
    assert num_summaries(NSA, np.array([0, 7, 8, 11, 12])).tolist() == [0, 0, 1, 1, 2]


def test_a_longer_document_costs_more_only_by_its_pairs():
    model = Transformer(CONFIG)
    one, two = np.array([64]), np.array([32, 32])
    difference = training_flops(model, one) - training_flops(model, two)
    pairs = (
        ATTENTION_KINDS["nsa"].visible_pairs(CONFIG, one).sum()
        - ATTENTION_KINDS["nsa"].visible_pairs(CONFIG, two).sum()
    )
    summary_weights = 2 * 2 * (2 * 8 * 8 * 8 + 2 * 8 * 8)  # layers, k and v, KV heads × (l·D × M + M × D)
    blocks = num_summaries(NSA, one).sum() - num_summaries(NSA, two).sum()
    assert difference == 6 * (2 * pairs * 4 * 16 + summary_weights * blocks)


def test_linear_layers_count_six_flops_a_weight_and_token():
    model = Transformer(CONFIG)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert training_flops(model, np.array([1])) == 6 * (linear + 2 * 2 * 4 * 16)  # 2 layers, 2 pairs, 4 heads
    assert linear > 100 * 32
