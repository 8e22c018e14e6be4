"""Where runs keep their files, which checkpoints are a run's own, and the command that `fit` ends with."""

import itertools
import math
import shlex

import pytest
import torch
import yaml
from support.command_line import LOGGED, run, run_small

PROJECT = ("--trainer.logger", "support.command_line.ProjectLogger", "--trainer.logger.save_dir", "out")


def resumed(messages, word="last"):
    """What `--ckpt_path last` was found to stand for."""
    (line,) = [each for each in messages.messages if each.startswith(f"ckpt_path={word}: ")]
    messages.clear()
    return line.removeprefix(f"ckpt_path={word}: ")


@pytest.fixture
def messages(caplog, monkeypatch):
    """What Lightning logs."""
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    return caplog


def fit(monkeypatch, *arguments):
    assert run_small(monkeypatch, "fit", *arguments) == 0


def closing_command(capsys):
    """The words after `nsa` of the command that `fit` ends with, and what is said to it."""
    lines = capsys.readouterr().out.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.startswith("train on")]
    return shlex.split(lines[number].removeprefix("train on"))[1:], lines[number + 1]


def steps_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)["global_step"]


@pytest.mark.slow
def test_a_run_in_a_project_finds_its_own_checkpoints_and_no_other_ones(workplace, monkeypatch, messages):
    named = (*PROJECT, "--trainer.logger.project", "proj", "--trainer.logger.name")
    fit(monkeypatch, *named, "one")
    (checkpoint,) = workplace.glob("out/proj/*/checkpoints/last.ckpt")
    assert {path.name for path in checkpoint.parent.parent.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "tokenizer.json",
    }
    assert not (workplace / "out" / "config.yaml").exists()
    messages.clear()
    more = ("--ckpt_path", "last", "--trainer.max_steps", "4")
    fit(monkeypatch, *named, "two", *more)
    assert resumed(messages).startswith("nothing of this run")
    fit(monkeypatch, *PROJECT, "--trainer.logger.project", "proj", *more)
    assert resumed(messages).startswith("nothing of this run")
    fit(monkeypatch, *PROJECT, "--trainer.logger.project", "other", "--trainer.logger.name", "one", *more)
    assert resumed(messages).startswith("nothing of this run")
    fit(monkeypatch, *named, "one", *more)
    assert resumed(messages) == str(checkpoint.relative_to(workplace))
    assert run_small(monkeypatch, "validate", *named, "one", "--ckpt_path", "best") == 0
    assert "/proj/" in resumed(messages, "best")


def test_a_version_that_is_named_is_a_run_of_its_own(workplace, monkeypatch, messages):
    fit(monkeypatch, *LOGGED, "--trainer.logger.version", "seed1")
    messages.clear()
    more = ("--ckpt_path", "last", "--trainer.max_steps", "4")
    fit(monkeypatch, *LOGGED, "--trainer.logger.version", "seed2", *more)
    assert resumed(messages).startswith("nothing of this run")
    fit(monkeypatch, *LOGGED, "--trainer.logger.version", "seed1", *more)
    assert "seed1" in resumed(messages)


@pytest.mark.slow
def test_runs_without_a_logger_and_in_a_directory_of_their_own_find_their_last(workplace, monkeypatch, messages):
    for place, arguments in (("checkpoints", []), ("mine", ["--checkpoint.dirpath", "mine"])):
        fit(monkeypatch, "--trainer.logger", "false", *arguments)
        messages.clear()
        fit(monkeypatch, "--trainer.logger", "false", *arguments, "--ckpt_path", "last", "--trainer.max_steps", "4")
        assert resumed(messages).endswith(f"{place}/last.ckpt")
        beside = workplace / place if arguments else workplace
        assert (beside / "config.yaml").is_file()
        assert (beside / "tokenizer.json").is_file()
    fit(monkeypatch, "--trainer.logger", "false", "--checkpoint.dirpath", "mine/of_another")
    messages.clear()
    fit(monkeypatch, "--trainer.logger", "false", "--checkpoint.dirpath", "mine", "--ckpt_path", "last",
        "--trainer.max_steps", "5")  # fmt: skip
    assert not resumed(messages).endswith("of_another/last.ckpt")


def test_generate_finds_the_tokenizer_in_a_directory_of_checkpoints(workplace, monkeypatch, capsys):
    fit(monkeypatch, "--checkpoint.dirpath", "mine")
    options = ("--prompt", "document", "--max_new_tokens", "3")
    assert run(monkeypatch, "generate", "--model", "mine/last.ckpt", *options) == 0


def test_the_closing_command_of_a_finished_run_trains_on_and_says_what_becomes_of_the_rate(
    workplace, monkeypatch, capsys
):
    fit(monkeypatch, "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "runs of mine",
        "--model.schedule.warmup_steps", "1")  # fmt: skip
    command, words = closing_command(capsys)
    rates = (3e-4 * (0.1 + 0.9 * 0.5), 3e-4 * (0.1 + 0.9 * (1 + math.cos(0.4 * math.pi)) / 2))
    assert "one of 6 steps raises the learning rate again, from {:.3g} to {:.3g}".format(*rates) in words
    assert run(monkeypatch, *command) == 0
    assert {steps_of(path) for path in workplace.glob("runs of mine/**/last.ckpt")} == {3, 6}


@pytest.mark.slow
def test_the_closing_command_of_a_run_out_of_time_keeps_the_schedule_and_goes_on(workplace, monkeypatch, capsys):
    clock = itertools.count(step=0.125)  # seconds, as often as it is looked at
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    times = ("--trainer.max_steps", "100000", "--trainer.val_check_interval", "100000", "--trainer.max_time")
    fit(monkeypatch, *LOGGED, *times, "00:00:00:01")
    command, words = closing_command(capsys)
    assert "--trainer.max_steps" not in command
    assert "of 100000, along the same schedule" in words
    assert run(monkeypatch, *command) == 0
    first, second = (steps_of(next(workplace.glob(f"runs/**/version_{n}/**/last.ckpt"))) for n in (0, 1))
    assert second > first


def test_measurements_leave_one_file_with_the_run_and_say_where(workplace, monkeypatch, capsys, recwarn, messages):
    fit(monkeypatch, *LOGGED)
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    (config,) = workplace.glob("runs/**/config.yaml")
    saved = config.read_text()
    before = set(workplace.rglob("*"))
    recwarn.clear()
    messages.clear()
    words = ("--config", str(config), "--ckpt_path", str(checkpoint))
    for command in ("validate", "predict"):
        assert run(monkeypatch, command, *words) == 0
    made = [path for path in set(workplace.rglob("*")) - before if path.is_file()]
    assert [path.name for path in made] == ["document_scores.jsonl"]
    assert str(made[0].relative_to(workplace)) in capsys.readouterr().out
    assert made[0].is_relative_to(config.parent)
    assert config.read_text() == saved
    told = [str(warning.message) for warning in recwarn] + messages.messages
    assert not [text for text in told if "dirpath has changed" in text or "FLOPs" in text]


@pytest.mark.slow
@pytest.mark.parametrize(
    "logger", [LOGGED, ("--trainer.logger", "CSVLogger", *LOGGED[2:]), ("--trainer.logger", "true")]
)
def test_measurements_find_the_last_and_the_best_checkpoint_of_the_run(workplace, monkeypatch, messages, logger):
    fit(monkeypatch, *logger)
    (last,), (best,) = workplace.rglob("last.ckpt"), workplace.rglob("step*.ckpt")
    messages.clear()
    for word, path in (("last", last), ("best", best)):
        assert run_small(monkeypatch, "validate", *logger, "--ckpt_path", word) == 0
        assert (workplace / resumed(messages, word)).resolve() == path.resolve()


@pytest.mark.slow
def test_resuming_in_a_new_version_is_no_reason_for_a_warning(workplace, monkeypatch, recwarn, messages):
    fit(monkeypatch, *LOGGED)
    recwarn.clear()
    fit(monkeypatch, *LOGGED, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert resumed(messages).endswith("last.ckpt")
    assert not [str(each.message) for each in recwarn if "dirpath" in str(each.message)]


def test_the_config_of_a_run_is_kept_with_its_checkpoints(workplace, monkeypatch):
    fit(monkeypatch, *LOGGED, "--trainer.logger.sub_dir", "events")
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    saved = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text())
    assert saved["trainer"]["max_steps"] == 3


@pytest.mark.slow
def test_a_tilde_and_variables_are_expanded_in_every_path_of_a_run(workplace, monkeypatch, messages, capsys):
    monkeypatch.setenv("HOME", str(workplace / "home"))
    monkeypatch.setenv("PLACE", str(workplace / "place"))
    monkeypatch.setenv("TEXTS", str(workplace / "texts"))
    (workplace / "home").mkdir()
    (workplace / "small.yaml").rename(workplace / "home" / "mine.yaml")
    words = ("--config", "~/mine.yaml", "--data.sources", "$TEXTS", "--trainer.logger", "CSVLogger")
    words += ("--trainer.logger.save_dir", "~/runs", "--data.cache_dir", "$PLACE/cache")
    assert run(monkeypatch, "fit", *words) == 0
    assert "home/runs/" in " ".join(closing_command(capsys)[0])
    messages.clear()
    assert run(monkeypatch, "fit", *words, "--ckpt_path", "last", "--trainer.max_steps", "4") == 0
    assert resumed(messages).startswith(str(workplace / "home" / "runs"))
    checkpoint = "$HOME/runs/lightning_logs/version_0/checkpoints/last.ckpt"
    scores = ("--document_scores.path", "$PLACE/scores.jsonl")
    assert run(monkeypatch, "predict", *words, "--ckpt_path", checkpoint, *scores) == 0
    assert run(monkeypatch, "fit", *words, "--checkpoint.dirpath", "~/ck") == 0
    assert run(monkeypatch, "export", "--checkpoint", "~/ck/last.ckpt", "--output", "$PLACE/exported") == 0
    assert {path.name for path in (workplace / "place").iterdir()} == {"cache", "scores.jsonl", "exported"}
    assert not list(workplace.glob("*~*")) + list(workplace.glob("*$*"))
