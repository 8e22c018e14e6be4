import math

import pytest
import torch
from nsa_kernels.rotary import apply_rotary

from nsa_lightning.model.rope import RopeConfig, RotaryEmbedding, rotary_frequencies


def test_a_score_depends_on_relative_position_only():
    rotary = RotaryEmbedding(RopeConfig(), rotary_dim=16)
    q, k = torch.randn(1, 2, 16), torch.randn(1, 2, 16)

    def score(query_position, key_position):
        turned_q = apply_rotary(q, *rotary(torch.tensor([query_position])))
        turned_k = apply_rotary(k, *rotary(torch.tensor([key_position])))
        return (turned_q * turned_k).sum(-1)

    torch.testing.assert_close(score(9, 4), score(1009, 1004), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(score(9, 4), score(9, 5))


def test_dimensions_past_the_rotated_ones_stay():
    rotary = RotaryEmbedding(RopeConfig(), rotary_dim=8)
    x = torch.randn(3, 2, 12)
    turned = apply_rotary(x, *rotary(torch.arange(3)))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.equal(turned[1:, :, :8], x[1:, :, :8])


def test_a_half_turn_negates_the_pair():
    x = torch.tensor([[[1.0, 2.0]]])
    half_turn = torch.tensor([[math.pi]])
    torch.testing.assert_close(apply_rotary(x, half_turn.cos(), half_turn.sin()), -x)


def test_linear_scaling_divides_every_frequency():
    plain = rotary_frequencies(RopeConfig(), 16)
    scaled = rotary_frequencies(RopeConfig(scaling="linear", factor=4.0), 16)
    torch.testing.assert_close(scaled, plain / 4)


def test_llama3_scaling_keeps_fast_dimensions_and_divides_slow_ones():
    """Values of Llama 3.1's published configuration, computed by hand from its wavelength rule."""
    config = RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, original_max_seq_len=8192)
    plain, scaled = rotary_frequencies(RopeConfig(theta=500000.0), 128), rotary_frequencies(config, 128)
    wavelengths = 2 * math.pi / plain
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192
    assert torch.equal(scaled[fast], plain[fast])
    torch.testing.assert_close(scaled[slow], plain[slow] / 8)
    between = ~(fast | slow)
    smooth = (8192 / wavelengths[between] - 1) / 3
    torch.testing.assert_close(scaled[between], (1 - smooth) * plain[between] / 8 + smooth * plain[between])
    assert fast.any()
    assert slow.any()
    assert between.any()


def test_yarn_scaling_ramps_between_fast_and_slow_dimensions_and_raises_the_scores():
    config = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=4096)
    plain, scaled = rotary_frequencies(RopeConfig(), 128), rotary_frequencies(config, 128)
    ratio = scaled / plain
    turns = 4096 * plain / (2 * math.pi)
    torch.testing.assert_close(ratio[turns > 40], torch.ones_like(ratio[turns > 40]))
    torch.testing.assert_close(ratio[turns < 0.9], torch.full_like(ratio[turns < 0.9], 0.25))
    assert (ratio.diff() <= 1e-6).all()
    assert ((ratio > 0.3) & (ratio < 0.9)).any()
    cos, _ = RotaryEmbedding(config, 128)(torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(cos[0, 0].item(), 0.1 * math.log(4) + 1)


def test_casting_the_model_down_leaves_positions_exact():
    rotary = RotaryEmbedding(RopeConfig(), 16)
    positions = torch.tensor([7, 8000])
    exact = rotary(positions)
    cast = rotary.to(torch.bfloat16)(positions)
    assert all(torch.equal(a, b) for a, b in zip(exact, cast, strict=True))
    assert cast[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "yarn", "factor": 2.0}, "rope.original_max_seq_len must be set with rope.scaling=yarn, got None"),
        ({"factor": 8.0}, "rope.factor must be 1 with rope.scaling=none, got 8.0"),
        ({"factor": 0.5}, "rope.factor must be at least 1, got 0.5"),
        ({"theta": 0.0}, "rope.theta must be above 1, got 0.0"),
        ({"low_freq_factor": 4.0}, "rope.high_freq_factor must be above rope.low_freq_factor, got 4.0 and 4.0"),
        ({"beta_fast": 1.0}, "rope.beta_fast must be above rope.beta_slow, got 1.0 and 1.0"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RopeConfig(**settings)
