"""A resumed run trains with the settings that it is given, and says which of them the checkpoint had otherwise."""

import warnings

import pytest
import torch
from support.training import SaveAfter, data_module, language_model, make_trainer
from torch.optim import SGD, Adam, AdamW

from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import WarmupCosine

SAVED = 3
UNTIL = {"max_steps": 5, "max_epochs": -1}


def adamw(**changes):
    return lambda groups: AdamW(groups, **({"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1} | changes))


@pytest.fixture(scope="module")
def checkpoint(folder):
    path = folder / "saved.ckpt"
    trainer = make_trainer(folder, SaveAfter(SAVED, path), **(UNTIL | {"max_steps": SAVED}))
    trainer.fit(language_model(optimizer=adamw()), data_module(folder / "corpus"))
    return path


def resume(folder, checkpoint, strategy="auto", max_steps=SAVED, **changes):
    """The module of a run that resumes and has its steps already, its optimizer, and what was told."""
    module = language_model(**({"optimizer": adamw()} | changes))
    trainer = make_trainer(folder, **(UNTIL | {"max_steps": max_steps}), strategy=strategy)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data_module(folder / "corpus"), ckpt_path=checkpoint)
    (optimizer,) = trainer.optimizers
    told = [str(w.message) for w in caught if "hold from here on" in str(w.message)]
    return trainer, optimizer, told


def test_unchanged_settings_are_not_told(folder, checkpoint):
    _, optimizer, told = resume(folder, checkpoint)
    assert not told
    (saved,) = torch.load(checkpoint, weights_only=True)["optimizer_states"]
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in saved["param_groups"]]


def test_a_changed_learning_rate_decay_and_beta_hold_and_are_told_in_one_line(folder, checkpoint):
    changed = adamw(lr=0.5, weight_decay=0.0, betas=[0.8, 0.95])
    trainer, optimizer, (told,) = resume(folder, checkpoint, optimizer=changed)
    factor = WarmupCosine(warmup_steps=2).factor(SAVED, SAVED)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.5 * factor)
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["weight_decay"] == 0.0
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.5] * len(optimizer.param_groups)
    for change in ("lr was 0.001, is 0.5", "weight_decay was 0.1, is 0.0", "betas was (0.9, 0.95), is (0.8, 0.95)"):
        assert told.count(f"model.optimizer.init_args.{change}") == 1
    assert "max_steps" not in told
    assert all(float(entry["step"]) == SAVED for entry in optimizer.state.values())


def test_the_next_steps_are_taken_with_the_configured_rates(folder, checkpoint):
    """And those that are saved are true."""
    again = folder / "again.ckpt"
    module = language_model(optimizer=adamw(lr=0.02))
    trainer = make_trainer(folder, SaveAfter(5, again), **UNTIL)
    with pytest.warns(UserWarning, match=r"trainer.max_steps was 3, is 5; .*lr was 0.001, is 0.02"):
        trainer.fit(module, data_module(folder / "corpus"), ckpt_path=checkpoint)
    saved = torch.load(again, weights_only=True)
    (state,) = saved["optimizer_states"]
    expected = 0.02 * WarmupCosine(warmup_steps=2).factor(5, 5)
    assert [group["lr"] for group in state["param_groups"]] == pytest.approx([expected] * len(state["param_groups"]))
    assert saved["training_settings"]["trainer.max_steps"] == 5


def test_changes_of_the_schedule_and_of_new_parts_are_told(folder, checkpoint):
    module = LanguageModel(
        language_model().transformer_config, optimizer=adamw(), schedule=WarmupCosine(warmup_steps=2, final_ratio=0.5)
    )
    trainer = make_trainer(folder, **(UNTIL | {"max_steps": SAVED}))
    with pytest.warns(UserWarning, match=r"hold from here on: model.schedule.final_ratio was 0.1, is 0.5$"):
        trainer.fit(module, data_module(folder / "corpus"), ckpt_path=checkpoint)
    _, optimizer, (told,) = resume(folder, checkpoint, new_parts={"lr_factor": 4.0})
    assert "model.new_parts.lr_factor was 1.0, is 4.0" in told
    assert "model.optimizer.init_args.lr of the new parts was 0.001, is 0.004" in told
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["new_parts_decayed"] == pytest.approx(4 * rates["decayed"])


@pytest.mark.parametrize("old_version", [False, True])
def test_another_optimizer_is_refused_by_name(folder, checkpoint, old_version):
    if old_version:  # which said nothing of its settings
        content = torch.load(checkpoint, weights_only=True)
        del content["training_settings"]
        checkpoint = folder / "older.ckpt"
        torch.save(content, checkpoint)
        assert not resume(folder, checkpoint)[2]
    with pytest.raises(ValueError, match=r"model.optimizer must stay as it was to resume: .* now it is SGD"):
        resume(folder, checkpoint, optimizer=lambda groups: SGD(groups, lr=0.1))
    with pytest.raises(
        ValueError, match=r"init_args.amsgrad must stay as it was .* trained with False, now it is True"
    ):
        resume(folder, checkpoint, optimizer=adamw(amsgrad=True))
    if not old_version:
        with pytest.raises(ValueError, match=r"trained with AdamW, now it is Adam$"):
            resume(folder, checkpoint, optimizer=lambda groups: Adam(groups, lr=1e-3))


def test_a_fused_optimizer_resumes_from_one_that_was_not(folder, checkpoint):
    _, optimizer, told = resume(folder, checkpoint, optimizer=adamw(fused=True), max_steps=4)
    assert all(group["fused"] for group in optimizer.param_groups)
    assert "fused" not in " ".join(told)
