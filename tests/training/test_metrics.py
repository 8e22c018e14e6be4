import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.training.metrics import LanguageModelingMetrics, LossByPosition


def test_sums_over_batches_not_means_of_means():
    metrics = LanguageModelingMetrics()
    metrics.update(torch.tensor(10.0), torch.tensor(4), torch.tensor(20))
    metrics.update(torch.tensor(2.0), torch.tensor(2), torch.tensor(4))
    values = metrics.compute()
    assert values["loss"] == 2.0
    torch.testing.assert_close(values["perplexity"], torch.tensor(2.0).exp())
    torch.testing.assert_close(values["bits_per_byte"], torch.tensor(12 / math.log(2) / 24))


def test_a_million_small_additions_lose_nothing():
    metrics = LanguageModelingMetrics()
    metrics.update(torch.tensor(2.0**24), torch.tensor(2**24), torch.tensor(2**24))
    for _ in range(10):
        metrics.update(torch.tensor(1.0), torch.tensor(1), torch.tensor(1))
    assert metrics.tokens == 2**24 + 10
    assert metrics.nats == 2**24 + 10


def test_a_model_cast_to_bfloat16_keeps_exact_sums():
    metrics = LanguageModelingMetrics().to(dtype=torch.bfloat16)
    for _ in range(2):
        for _ in range(201):
            metrics.update(torch.tensor(8000.0), torch.tensor(2048), torch.tensor(7000))
        assert metrics.nats == 201 * 8000
        assert metrics.tokens == 201 * 2048
        metrics.reset()


@given(st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 9), st.booleans()), min_size=1), st.integers(1, 5))
def test_each_bucket_has_the_mean_over_all_batches_of_its_scored_positions(tokens, num_batches):
    metric = LossByPosition()
    for _ in range(2):  # the second time after a reset
        for index in range(num_batches):
            batch = tokens[index::num_batches]
            positions, losses, scored = (torch.tensor([token[i] for token in batch]) for i in range(3))
            metric.update(losses.float(), positions.long(), scored.bool())
        found = {name: float(value) for name, value in metric.compute().items()}
        metric.reset()
        expected = {}
        for position, loss, scored in tokens:
            if scored:
                start = 2 ** (position.bit_length() - 1) if position >= 256 else 0
                expected.setdefault(str(start), []).append(loss)
        assert found == pytest.approx({name: sum(values) / len(values) for name, values in expected.items()})
