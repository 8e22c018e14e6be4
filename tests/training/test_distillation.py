"""A teacher's predictions are learned beside the next tokens, and nothing else of it is seen."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from support.dense import write_source
from support.training import fit, language_model, make_trainer, packed_batches

from nsa_lightning.data.batch import IGNORE_INDEX
from nsa_lightning.training.distillation import Distillation, Teacher

ONE_STEP = {"max_steps": 1, "max_epochs": -1}
DENSE = {"attention": ["full"], "num_kv_heads": 2, "tie_embeddings": False}


@pytest.fixture(scope="module")
def teacher(folder):
    return write_source(folder / "teacher")


def distilled(folder, teacher, weight=1.0, model=None, **settings):
    distillation = {"distillation": {"teacher": str(teacher), "weight": weight}} if weight else {}
    return fit(folder, folder / "corpus", **(ONE_STEP | settings), model=distillation | (model or {}))


def test_a_model_has_nothing_to_learn_from_itself(folder, teacher):
    model = {"transformer": DENSE, "init_from": str(teacher)}
    run = distilled(folder, teacher, weight=100.0, model=model)
    plain = distilled(folder, teacher, weight=0, model=model)
    assert abs(run["divergences"][0]) < 1e-5
    assert run["losses"] == plain["losses"]
    for name, gradient in plain["gradients"].items():
        torch.testing.assert_close(run["gradients"][name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max()))


def test_the_gradient_is_that_of_the_loss_and_the_weighted_divergence(folder, teacher):
    none, once, thrice = (distilled(folder, teacher, weight)["gradients"] for weight in (0, 1.0, 3.0))
    for name, gradient in none.items():
        expected = gradient + 3 * (once[name] - gradient)
        torch.testing.assert_close(thrice[name], expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-9)
    assert max((once[name] - gradient).abs().max() for name, gradient in none.items()) > 1e-2


def test_the_divergence_falls_where_it_is_all_that_counts(folder, teacher):
    data = {"batch_size": 1, "val_fraction": 0.6, "seq_len": 64}  # few sequences, each seen many times
    run = distilled(folder, teacher, weight=1e4, max_steps=60, data=data)
    assert sum(run["divergences"][-10:]) < 0.9 * sum(run["divergences"][:10])


def test_a_run_is_saved_without_its_teacher_and_goes_on_without_it(folder, teacher):
    path = folder / "distilled.ckpt"
    distilled(folder, teacher, max_steps=2, save=str(path), save_after=2)
    checkpoint = torch.load(path, weights_only=True)
    rest = distilled(folder, teacher, weight=0, max_steps=3, resume=str(path))
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in rest["weights"]}
    assert len(rest["losses"]) == 1
    assert not rest["divergences"]


def test_a_teacher_is_gone_when_training_ends(folder, teacher):
    module, trainer = language_model(distillation={"teacher": str(teacher)}), make_trainer(folder, **ONE_STEP)
    trainer.fit(module, packed_batches([40, 20], count=1))
    assert trainer.callback_metrics["train/distillation"] > 0
    assert module.teacher is None


def test_tokens_beyond_the_teachers_context_are_not_compared(tmp_path):
    short = write_source(tmp_path / "short", max_position_embeddings=20)
    teacher = Teacher.read(short, SingleDeviceStrategy("cpu"), "32-true")
    module = language_model({"num_kv_heads": 2})
    module.configure_model()
    (batch,) = packed_batches([50, 7, 30], count=1)
    hidden = module(batch).hidden
    nats, tokens = teacher.divergence(module.model, hidden, batch)
    near = (batch.positions < 20) & (batch.targets != IGNORE_INDEX)
    assert tokens == near.sum() == 20 + 6 + 20
    scrambled = hidden + 10 * ~near[:, None]
    torch.testing.assert_close(teacher.divergence(module.model, scrambled, batch)[0], nats)
    assert nats > 1


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("32-true", torch.float32)])
def test_the_teacher_is_frozen_in_the_dtype_of_computation(teacher, precision, dtype):
    made = Teacher.read(teacher, SingleDeviceStrategy("cpu"), precision)
    assert {(p.dtype, p.requires_grad) for p in made.model.parameters()} == {(dtype, False)}
    module = language_model()
    module.teacher = made
    assert not list(module.parameters())
    assert not module.state_dict()


def test_a_teacher_that_cannot_be_is_named(tmp_path, teacher):
    for weight in (0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"distillation.weight must be .*finite.*, got {weight}"):
            Distillation(weight=weight)
    with pytest.raises(ValueError, match=r"distillation.teacher must be a directory with a readable config.json"):
        language_model(distillation={"teacher": str(tmp_path)})
    with pytest.raises(
        ValueError, match=r"distillation.teacher must have the model's vocabulary of 301 tokens, got 300"
    ):
        language_model({"vocab_size": 301}, distillation={"teacher": str(teacher)})
    damaged = write_source(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes((damaged / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"distillation.teacher: .* is no whole safetensors file"):
        language_model(distillation={"teacher": str(damaged)})
