"""A bad loss never reaches the weights, and is told with its documents."""

import itertools

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from support.training import data_module, language_model, make_trainer, write_corpus
from torch.optim import AdamW

from nsa_lightning.training.callbacks import LossGuard


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return root


class Multiply(Callback):
    """Multiply the loss of some steps, and note the weights before and after every step."""

    def __init__(self, factors):
        self.factors, self.weights = factors, []

    def on_train_start(self, trainer, pl_module):
        plain = pl_module.summed_loss

        def summed_loss(batch, watch=False):
            nats, tokens, output = plain(batch, watch)
            return nats * self.factors.get(trainer.global_step, 1.0), tokens, output

        pl_module.summed_loss = summed_loss
        self.note(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note(pl_module)

    def note(self, pl_module):
        self.weights.append(pl_module.model.layers[0].mlp.up_proj.weight.detach().clone())


def run(tmp_path, corpus, factors, guard, *, fused=True, steps=4):
    """The weights before and after each step."""
    seed_everything(0, verbose=False)
    multiply = Multiply(factors)
    module = language_model(optimizer=lambda groups: AdamW(groups, lr=1e-3, fused=fused))
    make_trainer(tmp_path, guard, multiply, max_steps=steps).fit(module, data_module(corpus))
    return multiply.weights


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_the_weights_change(tmp_path, corpus, fused, factor):
    guard, multiply = LossGuard(), Multiply({2: factor})
    module = language_model(optimizer=lambda groups: AdamW(groups, lr=1e-3, fused=fused))
    message = (
        r"loss must be finite, got train/loss \w+, .* in step 2: rank 0 had \d+ documents of \d+.* begins '.+def fun"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, multiply, guard).fit(module, data_module(corpus))
    torch.testing.assert_close(module.model.layers[0].mlp.up_proj.weight, multiply.weights[2], rtol=0, atol=0)
    assert not torch.equal(multiply.weights[1], multiply.weights[2])


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_left_out_changes_no_weight_and_the_run_goes_on(tmp_path, corpus, fused):
    with pytest.warns(UserWarning, match="step left out, 1 of at most 10: train/loss nan"):
        weights = run(tmp_path, corpus, {2: float("nan")}, LossGuard(skip=True), fused=fused)
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(weights)]
    assert changed == [True, True, False, True]


def test_no_more_steps_are_left_out_than_allowed(tmp_path, corpus):
    nan = float("nan")
    with pytest.raises(ValueError, match=r"loss_guard\.max_skips=1 steps were left out and one more is due"):
        run(tmp_path, corpus, {1: nan, 2: nan}, LossGuard(skip=True, max_skips=1))


@pytest.mark.parametrize("skip", [True, False])
def test_a_spike_is_told_and_left_out_only_if_asked_to(tmp_path, corpus, skip):
    word = "step left out, 1 of at most 10" if skip else "the loss spikes"
    with pytest.warns(UserWarning, match=rf"{word}.* in step 22, after a mean loss of"):
        weights = run(tmp_path, corpus, {5: 10.0, 22: 10.0}, LossGuard(skip=skip), steps=23)
    assert torch.equal(weights[22], weights[23]) is skip
    assert not torch.equal(weights[5], weights[6])  # too early to know what is usual


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_skips": 0}, "loss_guard.max_skips must be at least 1, got 0"),
        ({"spike_ratio": 1.0}, "loss_guard.spike_ratio must be above 1, got 1.0"),
        ({"window": 5}, "loss_guard.window must be at least 20, got 5"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        LossGuard(**settings)
