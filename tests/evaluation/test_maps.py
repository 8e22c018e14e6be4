"""Selection maps: counted by hand, and drawn for a model."""

import numpy as np
import pytest
import torch
from support.evaluation import completion
from support.training import CONFIG

from nsa_lightning.evaluation.maps import _shares, draw_selection, selection_maps, text_of_maps
from nsa_lightning.model.transformer import Transformer


def test_choices_are_counted_by_hand():
    blocks = torch.tensor([[[0, -1]], [[0, -1]], [[0, 1]], [[1, -1]]], dtype=torch.int32)  # 4 queries, 2 tokens a block
    found = _shares(3, blocks, 2)
    expected = np.array([[1, np.nan], [1, np.nan], [1, 1], [0, 1]])
    np.testing.assert_array_equal(found.shares, expected)
    assert (found.layer, found.tokens_a_row, found.tokens_a_column) == (3, 1, 2)


def test_a_long_text_is_shown_in_fewer_cells():
    blocks = torch.zeros(1000, 2, 1, dtype=torch.int32)  # every query and both heads choose the first block
    found = _shares(0, blocks, 4)
    assert found.shares.shape == (125, 125)
    assert (found.tokens_a_row, found.tokens_a_column) == (8, 8)
    assert found.shares[0, 0] == pytest.approx(8 / (4 * 1 + 4 * 2))
    np.testing.assert_array_equal(found.shares[1:, 0], 0.5)
    assert np.nansum(found.shares[:, 1:]) == 0
    assert np.isnan(found.shares[0, 1:]).all()
    assert not np.isnan(found.shares[-1]).any()


def test_a_model_s_own_choices_are_shown_layer_by_layer():
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    tokens = text_of_maps(None, 700, completion())
    maps = selection_maps(model, tokens)
    assert [found.layer for found in maps] == [0, 1]
    blocks = -(-len(tokens) // CONFIG.nsa.select_block_size)
    for found in maps:
        full = found.shares[-1]
        assert np.nansum(full) * found.tokens_a_column / CONFIG.nsa.select_block_size == pytest.approx(
            CONFIG.nsa.num_selected_blocks, rel=0.2
        )
        assert full[0] > 1 / blocks  # the first block is always chosen
        assert full[-1] > 1 / blocks  # so is the query's own
    figure = draw_selection(maps, "a title")
    assert [panel.get_title() for panel in figure.axes[:2]] == ["layer 0", "layer 1"]


def test_what_cannot_be_shown_is_named(tmp_path):
    from dataclasses import replace

    dense = Transformer(replace(CONFIG, attention=["full"]))
    with pytest.raises(ValueError, match="maps need nsa layers, the model has full alone"):
        selection_maps(dense, torch.zeros(100, dtype=torch.int64))
    with pytest.raises(ValueError, match="the text of maps must have at least 16 tokens, got 3"):
        selection_maps(Transformer(CONFIG), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="the text of maps must be a text file, got"):
        text_of_maps(str(tmp_path / "gone"), 100, completion())
