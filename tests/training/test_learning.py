"""NSA learns what its window cannot see."""

import math

import pytest
import torch
from nsa_kernels.packing import document_positions
from support.packings import cu_seqlens

from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.model.config import NSALayerConfig
from nsa_lightning.model.loss import summed_cross_entropy

LENGTH, NUM_DOCUMENTS, NUM_VALUES = 96, 16, 8
FILLER, QUESTION = 0, NUM_VALUES + 1  # token ids: the filler, the values, the question
IGNORED = -100
GEOMETRY = {
    "compress_block_size": 4,
    "compress_stride": 2,
    "select_block_size": 8,
    "num_selected_blocks": 4,
    "num_local_blocks": 1,
    "window_size": 8,
}


def copy_task(generator):
    """Documents of filler with one value somewhere in the middle, to be copied at the end where the question is."""
    tokens = torch.full((NUM_DOCUMENTS, LENGTH), FILLER)
    targets = torch.full((NUM_DOCUMENTS, LENGTH), IGNORED)
    source = torch.randint(8, LENGTH - 24, (NUM_DOCUMENTS,), generator=generator)  # past the always selected block 0
    values = torch.randint(1, NUM_VALUES + 1, (NUM_DOCUMENTS,), generator=generator)
    tokens[torch.arange(NUM_DOCUMENTS), source] = values
    tokens[:, -1] = QUESTION
    targets[:, -1] = values
    return tokens.flatten(), targets.flatten()


def final_loss(kind, steps):
    """Mean loss over the last steps of training on fresh documents, in nats an answer."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Transformer(
        TransformerConfig(
            vocab_size=QUESTION + 1,
            hidden_size=64,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=128,
            attention=[kind],
            sliding_window=GEOMETRY["window_size"],
            nsa=NSALayerConfig(**GEOMETRY),
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    offsets = cu_seqlens([LENGTH] * NUM_DOCUMENTS)
    positions = document_positions(offsets, LENGTH * NUM_DOCUMENTS)
    losses = []
    for _ in range(steps):
        tokens, targets = copy_task(generator)
        hidden = model(tokens, positions, offsets, LENGTH).hidden
        loss = summed_cross_entropy(hidden, model.output_embedding, targets, IGNORED) / (targets != IGNORED).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_nsa_copies_from_beyond_its_window_and_its_selected_tokens():
    assert GEOMETRY["num_selected_blocks"] * GEOMETRY["select_block_size"] < LENGTH
    assert final_loss("nsa", steps=90) < 0.2


@pytest.mark.slow
def test_a_window_alone_cannot_copy_from_beyond_it():
    assert final_loss("sliding", steps=90) > 0.9 * math.log(NUM_VALUES)
