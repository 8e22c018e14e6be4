"""Other methods of attending to what is cached: `full` layers alone take them, with what the protocol says."""

import dataclasses

import pytest
import torch
from support.packings import cu_seqlens

from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.model import Cache, Transformer, TransformerConfig
from nsa_lightning.model.attention.dense import ExactAttention
from nsa_lightning.model.cached import decode, prefill

CONFIG = TransformerConfig(
    vocab_size=50, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=40, sliding_window=5,
    attention=["sliding", "full", "full"],
)  # fmt: skip


class Recorded:
    """Exact attention that remembers its calls."""

    def __init__(self):
        self.prefills, self.decodes = [], []

    def prefill(self, layer, row, start, q, k, v):
        assert len(k) == len(v) == start + len(q)
        self.prefills.append((layer, row, start, len(q)))
        return ExactAttention().prefill(layer, row, start, q, k, v)

    def decode(self, layer, q, k, v, positions):
        assert k.shape == (2, 30, 2, 6)
        self.decodes.append((layer, positions.tolist()))
        assert all(k[row, position].any() for row, position in enumerate(positions.tolist()))  # the new token's own
        return ExactAttention().decode(layer, q, k, v, positions)


class FirstTokens:
    """Every token sees the first three of its sequence alone."""

    def prefill(self, layer, row, start, q, k, v):
        return v[:3].mean(0).repeat_interleave(2, dim=0).expand(len(q), -1, -1)

    def decode(self, layer, q, k, v, positions):
        return v[:, :3].mean(1).repeat_interleave(2, dim=1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(CONFIG).double().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(0, 50, (20,), generator=torch.Generator().manual_seed(0))


def test_full_layers_alone_ask_the_method_with_their_index_row_and_positions(model, tokens):
    method = Recorded()
    cache = Cache.allocate(CONFIG, 2, 30, dtype=torch.float64, dense_attention=method)
    hidden = prefill(model, tokens[:12], cache, 1, chunk_size=8)
    prefill(model, tokens[:3], cache, 0)
    after = decode(model, tokens[[3, 12]], cache)
    expected = model(tokens, torch.arange(20), cu_seqlens([20]), 20).hidden
    torch.testing.assert_close(hidden, expected[11], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after, expected[[3, 12]], rtol=1e-9, atol=1e-9)
    assert method.prefills == [(1, 1, 0, 8), (2, 1, 0, 8), (1, 1, 8, 4), (2, 1, 8, 4), (1, 0, 0, 3), (2, 0, 0, 3)]
    assert method.decodes == [(1, [3, 12]), (2, [3, 12])]


def test_what_the_method_returns_is_what_the_layer_attends_to(model, tokens):
    def last(method):
        cache = Cache.allocate(CONFIG, 1, 30, dtype=torch.float64, dense_attention=method)
        return torch.stack([prefill(model, tokens, cache, 0), decode(model, tokens[:1], cache)[0]])

    assert not torch.allclose(last(FirstTokens()), last(ExactAttention()))


def test_a_grown_cache_keeps_its_method(model, tokens):
    method = Recorded()
    cache = Cache.allocate(CONFIG, 2, 5, dtype=torch.float64, dense_attention=method).grown(30)
    prefill(model, tokens, cache, 0)
    assert len(method.prefills) == 2


def test_the_decoder_hands_the_method_to_its_cache(model):
    method = Recorded()
    decoder = Decoder(model, 2, 30, cuda_graphs=False, dense_attention=method)
    decoder.begin(0, torch.arange(4))
    decoder.step([1, 2])
    assert method.prefills == [(1, 0, 0, 4), (2, 0, 0, 4)]
    assert method.decodes == [(1, [4, 0]), (2, [4, 0])]


def test_models_without_full_layers_never_ask(tokens):
    config = dataclasses.replace(CONFIG, attention=["sliding"])
    method = Recorded()
    cache = Cache.allocate(config, 1, 30, dense_attention=method)
    prefill(Transformer(config).requires_grad_(False), tokens, cache, 0)
    assert cache.host_lengths == [20]
    assert not method.prefills
