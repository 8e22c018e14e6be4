"""Callbacks learn about a step from what it returns and from hooks that the module calls; they set nothing in it."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from support.training import language_model, make_trainer, packed_batches

from nsa_lightning.training.callbacks import GateMonitor
from nsa_lightning.training.step import StepCallback


class Outputs(Callback):
    """What every batch returned."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(outputs)


class Updates(StepCallback):
    """Loss and norm before every step of the optimizer, with the step's number and the gradient's norm just then."""

    def __init__(self):
        self.seen = []

    def on_before_update(self, trainer, pl_module, optimizer, loss, norm):
        clipped = torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        logged = trainer.callback_metrics["train/loss"].item()
        self.seen.append((trainer.global_step, loss.item() - logged, norm.item(), clipped.item()))


def fit(tmp_path, *callbacks, **settings):
    batches = packed_batches([24, 8], count=4)
    make_trainer(tmp_path, *callbacks, **settings).fit(language_model(), batches)


def test_layers_are_watched_in_the_steps_that_a_callback_asks_for_and_in_no_others(tmp_path):
    outputs = Outputs()
    fit(tmp_path, GateMonitor(every_n_steps=2), outputs, logger=CSVLogger(tmp_path), log_every_n_steps=100)
    assert [sorted(step["statistics"]) for step in outputs.steps] == [[], [0, 1], [], [0, 1]]
    assert all(float(step["statistics"][0].num_tokens) == 32 for step in outputs.steps[1::2])


def test_without_a_logger_nothing_is_watched(tmp_path):
    outputs = Outputs()
    fit(tmp_path, GateMonitor(every_n_steps=1), outputs)
    assert [step["statistics"] for step in outputs.steps] == [{}] * 4
    assert not any(step["loss"].requires_grad for step in outputs.steps)


def test_the_hook_before_an_update_comes_once_a_step_after_clipping(tmp_path):
    updates = Updates()
    fit(tmp_path, updates, max_steps=2, accumulate_grad_batches=2, gradient_clip_val=1e-3)
    assert [step for step, *_ in updates.seen] == [0, 1]
    for _, difference, norm, clipped in updates.seen:
        assert difference == 0
        assert clipped == pytest.approx(1e-3, rel=1e-2) and norm > 2e-3  # noqa: PT018


def test_a_model_without_a_decoder_says_what_to_call():
    module = language_model()
    with pytest.raises(RuntimeError, match="no decoder yet: call configure_model first"):
        _ = module.transformer
    module.configure_model()
    assert module.transformer is module.model
