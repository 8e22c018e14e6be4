"""Tasks and selection maps in a training run, as TensorBoard has them."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from support.training import data_module, language_model, make_trainer, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa_lightning.evaluation.callback import EvaluateTasks, SelectionMaps
from nsa_lightning.evaluation.needle import NeedleConfig
from nsa_lightning.evaluation.ruler import RulerConfig

pytestmark = pytest.mark.slow
LENGTHS = [700, 900]


def fitted(tmp_path, *callbacks, model=None, **settings):
    """The events of a run of four steps."""
    write_corpus(tmp_path)
    logger = TensorBoardLogger(str(tmp_path / "logs"))
    trainer = make_trainer(tmp_path, *callbacks, logger=logger, **settings)
    trainer.fit(language_model({"max_seq_len": 128, **(model or {})}), data_module(tmp_path))
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def test_scores_and_pictures_are_logged_every_n_steps(tmp_path):
    needle = NeedleConfig(depths=[0.0, 1.0], samples=2)
    callback = EvaluateTasks(every_n_steps=2, lengths=LENGTHS, needle=needle)
    events = fitted(tmp_path, callback, SelectionMaps(every_n_steps=4, num_tokens=700), accumulate_grad_batches=2)
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("evaluate/")]
    assert sorted(tags) == sorted(
        f"evaluate/needle_single/{score}/{length}" for score in ("score", "log_probability") for length in LENGTHS
    )
    for tag in tags:
        assert [event.step for event in events.Scalars(tag)] == [1, 3]
    assert all(event.value < -4 for event in events.Scalars("evaluate/needle_single/log_probability/700"))
    pictures = {tag: [event.step for event in events.Images(tag)] for tag in events.Tags()["images"]}
    assert pictures == {"evaluate/needle_single": [1, 3], "evaluate/selection": [3]}


def test_training_goes_on_as_if_nothing_had_been_asked(tmp_path):
    def weights(folder, *callbacks):
        folder.mkdir()
        write_corpus(folder)
        from lightning.pytorch import seed_everything

        seed_everything(0, verbose=False)
        module = language_model({"max_seq_len": 128})
        make_trainer(folder, *callbacks).fit(module, data_module(folder))
        return [parameter.detach().clone() for parameter in module.parameters()]

    plain = weights(tmp_path / "plain")
    asked = weights(
        tmp_path / "asked",
        EvaluateTasks(every_n_steps=1, lengths=[700], needle=NeedleConfig(depths=[0.5])),
        SelectionMaps(every_n_steps=1, num_tokens=700),
    )
    assert all((one == other).all() for one, other in zip(plain, asked, strict=True))


def test_ruler_can_be_asked_too(tmp_path):
    callback = EvaluateTasks(every_n_steps=4, lengths=[6500], tasks=["ruler"], ruler=RulerConfig(samples=1))
    tags = fitted(tmp_path, callback).Tags()["scalars"]
    kinds = {tag.split("/")[1] for tag in tags if tag.startswith("evaluate/")}
    assert kinds == {"ruler_variables", "ruler_common_words", "ruler_frequent_words"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "evaluate_tasks.every_n_steps must be at least 1, got 0"),
        ({"tasks": ["longbench"]}, "evaluate_tasks.tasks must be of needle, ruler, got"),
        ({"lengths": []}, "evaluate_tasks.lengths must be one or more numbers"),
        ({"batch_size": 0}, "evaluate_tasks.batch_size must be at least 1, got 0"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluateTasks(**settings)


def test_maps_of_a_model_that_selects_nothing_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="maps need nsa layers"):
        fitted(tmp_path, SelectionMaps(num_tokens=700), model={"attention": ["full"]})
