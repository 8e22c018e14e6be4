"""What NSAConfig accepts, and how it says no."""

import re
from dataclasses import FrozenInstanceError

import pytest
from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput


def test_defaults_are_those_of_the_paper():
    config = NSAConfig()
    assert (config.compress_block_size, config.compress_stride, config.select_block_size) == (32, 16, 64)
    assert (config.num_selected_blocks, config.num_init_blocks, config.num_local_blocks) == (16, 1, 2)
    assert config.window_size == 512


def test_selected_tokens_are_blocks_times_block_size():
    assert NSAConfig().selected_tokens == 1024
    assert NSAConfig(select_block_size=48, num_selected_blocks=5).selected_tokens == 240


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize(
    "name",
    [
        "compress_block_size",
        "compress_stride",
        "select_block_size",
        "num_selected_blocks",
        "num_local_blocks",
        "window_size",
    ],
)
def test_sizes_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}$"):
        NSAConfig(**{name: value})


def test_init_blocks_may_be_none_but_not_negative():
    assert NSAConfig(num_init_blocks=0).num_init_blocks == 0
    with pytest.raises(ValueError, match=r"^num_init_blocks must be at least 0, got -1$"):
        NSAConfig(num_init_blocks=-1)


@pytest.mark.parametrize(
    ("stride", "name", "size"),
    [(16, "compress_block_size", 40), (16, "select_block_size", 72), (16, "select_block_size", 8)],
)
def test_stride_must_divide_both_block_sizes(stride, name, size):
    message = f"compress_stride must divide {name}, got {stride} and {size}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        NSAConfig(**{"compress_stride": stride, name: size})


def test_block_sizes_need_not_be_powers_of_two_nor_in_order():
    config = NSAConfig(compress_block_size=60, compress_stride=12, select_block_size=24, num_selected_blocks=7)
    assert config.compress_block_size > config.select_block_size


def test_forced_blocks_must_fit_among_the_selected():
    assert NSAConfig(num_selected_blocks=3, num_init_blocks=1, num_local_blocks=2).num_selected_blocks == 3
    message = "num_selected_blocks must be at least num_init_blocks + num_local_blocks, got 3 and 2 + 2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NSAConfig(num_selected_blocks=3, num_init_blocks=2, num_local_blocks=2)


def test_config_is_frozen_keyword_only_and_hashable():
    config = NSAConfig()
    with pytest.raises(FrozenInstanceError):
        config.window_size = 1
    with pytest.raises(TypeError):
        NSAConfig(32)
    assert hash(config) == hash(NSAConfig())


def test_field_order_of_the_tuples_is_that_of_their_documentation():
    assert CompressionWeights._fields == ("position_embedding", "in_weight", "in_bias", "out_weight", "out_bias")
    assert CompressionWeights._field_defaults == {"out_weight": None, "out_bias": None}
    assert NSAOutput._fields == ("out", "block_indices")
