"""A step over several batches is the step over one batch that holds them all."""

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins import MixedPrecision
from support.dense import write_source
from support.same_run import assert_same_run
from support.training import data_module, fit, language_model, make_trainer, write_uneven_corpus
from torch.optim import SGD

from nsa_lightning.data.batch import IGNORE_INDEX

UNEVEN = {"packing": "best_fit", "val_fraction": 0, "test_fraction": 0}
"""Sequences of up to twice as many tokens as others, an odd number: a pass ends with a step of one batch."""
STEPS = {"max_steps": 5, "max_epochs": -1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("uneven")
    write_uneven_corpus(root)
    return root


def run(corpus, batch_size, accumulate, **settings):
    data = UNEVEN | {"batch_size": batch_size}
    return fit(corpus / "run", corpus, **STEPS, data=data, accumulate_grad_batches=accumulate, **settings)


def scored_tokens(corpus):
    data = data_module(corpus, **UNEVEN, batch_size=1)
    data.prepare_data()
    data.setup("fit")
    return [int((batch.targets != IGNORE_INDEX).sum()) for batch in data.train_dataloader()]


def test_batches_count_by_their_scored_tokens_also_where_a_pass_ends_with_fewer(corpus):
    scored = scored_tokens(corpus)
    assert len(scored) % 2 == 1
    assert len(scored) < 2 * STEPS["max_steps"]
    assert min(scored) < 0.7 * max(scored)
    assert_same_run(run(corpus, 1, 2), run(corpus, 2, 1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_in_bfloat16_too(corpus, precision):
    once, twice = run(corpus, 2, 1, precision=precision), run(corpus, 1, 2, precision=precision)
    assert twice["losses"] == pytest.approx(once["losses"], rel=1e-3)
    assert twice["norms"] == pytest.approx(once["norms"], rel=0.02)


def test_a_teachers_divergence_counts_by_the_same_tokens(corpus):
    """Also where the teacher is made for shorter documents."""
    teacher = write_source(corpus / "teacher", max_position_embeddings=40)
    model = {"distillation": {"teacher": str(teacher), "weight": 3.0}}
    once, twice = run(corpus, 2, 1, model=model), run(corpus, 1, 2, model=model)
    assert_same_run(twice, once)
    assert twice["divergences"] == pytest.approx(once["divergences"], rel=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_with_a_loss_scale_too(corpus, fused):
    """Steps of SGD, which follow the gradient's size; a fused optimizer divides the scale out in its step."""

    def weights(batch_size, accumulate, steps=3):
        seed_everything(0, verbose=False)
        scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
        module = language_model(optimizer=lambda groups: SGD(groups, lr=0.1, fused=fused))
        settings = {"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": accumulate}
        trainer = make_trainer(corpus, **settings, plugins=[scaled], gradient_clip_val=None)
        trainer.fit(module, data_module(corpus, **UNEVEN, batch_size=batch_size))
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    first, once, twice = weights(2, 1, steps=1), weights(2, 1), weights(1, 2)
    assert (twice - once).norm() < 0.02 * (once - first).norm()
