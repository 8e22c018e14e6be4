"""Gates and block summaries have their own learning rate, and train alone for a while."""

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from support.training import SaveAfter, data_module, fit, language_model, make_trainer

from nsa_lightning.model.attention.registry import is_new_part

FROZEN, STEPS = 3, 6
NEW_PARTS = {"freeze_others_steps": FROZEN, "lr_factor": 5.0}


@pytest.fixture(scope="module")
def checkpoints(folder):
    """Of one run: before its first step, in the middle of the frozen steps, at their end, and one step later."""
    paths = {step: folder / f"{step}.ckpt" for step in (1, FROZEN, FROZEN + 1)}
    torch.manual_seed(0)
    trainer = make_trainer(folder, *(SaveAfter(*item) for item in paths.items()), max_steps=STEPS, max_epochs=-1)
    module = language_model(new_parts=NEW_PARTS)
    module.configure_model()
    first = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.fit(module, data_module(folder / "corpus"))
    return {0: {"state_dict": first}} | {step: torch.load(path, weights_only=True) for step, path in paths.items()}


def changed(before, after):
    return {name for name, value in before["state_dict"].items() if not torch.equal(after["state_dict"][name], value)}


def test_what_is_frozen_does_not_change_by_a_bit_and_then_does(checkpoints):
    names = set(checkpoints[0]["state_dict"])
    moved = changed(checkpoints[0], checkpoints[FROZEN])
    assert all(is_new_part(name) for name in moved)
    assert {"model.layers.0.self_attn.branch_gate.weight", "model.layers.1.self_attn.k_summary.out_weight"} <= moved
    assert changed(checkpoints[FROZEN], checkpoints[FROZEN + 1]) == names


def test_moments_begin_with_the_first_step_of_their_weight(checkpoints):
    (state,) = checkpoints[FROZEN]["optimizer_states"]
    new = [i for group in state["param_groups"] for i in group["params"] if group["name"].startswith("new_parts")]
    assert set(state["state"]) == set(new)
    (state,) = checkpoints[FROZEN + 1]["optimizer_states"]
    assert {float(entry["step"]) for i, entry in state["state"].items() if i in new} == {FROZEN + 1}
    assert {float(entry["step"]) for i, entry in state["state"].items() if i not in new} == {1}


@pytest.mark.parametrize("step", [1, FROZEN, FROZEN + 1])
def test_a_run_goes_on_from_any_step_as_if_it_had_not_stopped(folder, checkpoints, step):
    settings = {"max_steps": STEPS, "max_epochs": -1, "model": {"new_parts": NEW_PARTS}}
    whole = fit(folder, folder / "corpus", **settings)
    rest = fit(folder, folder / "corpus", **settings, save=str(folder / "saved.ckpt"), save_after=step)
    rest = fit(folder, folder / "corpus", **settings, resume=str(folder / "saved.ckpt"))
    assert rest["losses"] == whole["losses"][step:]
    assert all(torch.equal(rest["weights"][name], value) for name, value in whole["weights"].items())


def test_the_learning_rates_are_shown_by_name_and_the_others_warm_up_when_they_begin(folder):
    monitor = LearningRateMonitor("step")
    logger = CSVLogger(folder / "logs")
    trainer = make_trainer(folder, monitor, max_steps=STEPS, max_epochs=-1, logger=logger, log_every_n_steps=1)
    trainer.fit(language_model(new_parts=NEW_PARTS), data_module(folder / "corpus"))
    rates = {name: torch.tensor(values) / 3e-4 for name, values in monitor.lrs.items()}
    names = ("decayed", "undecayed", "new_parts_decayed", "new_parts_undecayed")
    assert set(rates) == {f"lr-AdamW/{name}" for name in names}
    for name in ("decayed", "undecayed"):
        assert rates[f"lr-AdamW/{name}"][: FROZEN + 2].tolist() == pytest.approx([0.0] * FROZEN + [0.5, 1.0])
        assert rates[f"lr-AdamW/new_parts_{name}"][:2].tolist() == pytest.approx([2.5, 5.0])


def test_a_model_without_new_parts_trains_from_its_first_step(folder):
    settings = {"max_steps": 2, "max_epochs": -1}
    dense = {"transformer": {"attention": ["full"]}}
    frozen = fit(folder, folder / "corpus", **settings, model=dense | {"new_parts": NEW_PARTS})
    plain = fit(folder, folder / "corpus", **settings, model=dense)
    assert frozen["losses"] == plain["losses"]
    assert frozen["losses"][1] != frozen["losses"][0]
    assert all(torch.equal(frozen["weights"][name], value) for name, value in plain["weights"].items())
