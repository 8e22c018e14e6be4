import math

import torch

from nsa_lightning.training.metrics import LanguageModelingMetrics


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
