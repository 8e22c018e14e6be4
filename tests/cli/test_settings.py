"""How settings are read from the command line and from YAML. Run in the plain environment too."""

from collections.abc import Sequence

import pytest
import yaml
from nsa_cli.lists import join_lists
from support.command_line import SMALL, run, run_small

NUMBERS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


def printed_config(monkeypatch, capsys, *arguments):
    assert run_small(monkeypatch, "fit", *arguments, "--print_config") == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(("text", "kind"), [("1", int), ("1.0", float), ("3", int)])
def test_a_whole_number_stays_one_and_a_fraction_a_fraction(workplace, monkeypatch, capsys, text, kind):
    names = (*NUMBERS, "val_check_interval", "gradient_clip_val")
    words = [word for name in names for word in (f"--trainer.{name}", text)]
    trainer = printed_config(monkeypatch, capsys, *words)["trainer"]
    assert {name: (trainer[name], type(trainer[name])) for name in names} == dict.fromkeys(names, (float(text), kind))


def test_a_whole_number_in_yaml_stays_one(workplace, monkeypatch, capsys):
    lines = "".join(f"  {name}: {number}\n" for name, number in zip(NUMBERS, ("1", "1.0", "2", "1", "1"), strict=True))
    (workplace / "more.yaml").write_text(f"trainer:\n{lines}")
    trainer = printed_config(monkeypatch, capsys, "--config", "more.yaml")["trainer"]
    assert [(trainer[name], type(trainer[name])) for name in NUMBERS] == [
        (1, int), (1.0, float), (2, int), (1, int), (1, int)
    ]  # fmt: skip


def test_a_whole_number_of_a_callback_stays_one(workplace, monkeypatch, capsys):
    arguments = ("--trainer.callbacks", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", "0.1")
    printed = printed_config(monkeypatch, capsys, *arguments, "--trainer.callbacks.swa_epoch_start", "1")
    start = printed["trainer"]["callbacks"][0]["init_args"]["swa_epoch_start"]
    assert (start, type(start)) == (1, int)


def test_a_list_is_written_with_spaces_between_its_values(workplace, monkeypatch, capsys):
    words = ("--data.sources", "texts/1.txt", "texts/2.txt", "--data.exclude", "*.md", "--data.seq_len", "64")
    data = printed_config(monkeypatch, capsys, *words)["data"]
    assert data["sources"] == ["texts/1.txt", "texts/2.txt"]
    assert data["exclude"] in ("*.md", ["*.md"])
    assert printed_config(monkeypatch, capsys, "--data.sources+", "a b", "c")["data"]["sources"] == [
        "texts",
        "a b",
        "c",
    ]


@pytest.mark.parametrize(
    ("command", "arguments", "meant"),
    [
        ("fit", ["--data.source", "x"], "--data.sources"),
        ("fit", ["--data.seqlen", "64"], "--data.seq_len"),
        ("fit", ["--trainer.max_step", "3"], "--trainer.max_steps"),
        ("fit", ["--max_steps", "3"], "--trainer.max_steps"),
        ("fit", ["--model.optimizer", "AdamW", "--model.optimizer.lrr", "1"], "lr"),
        ("generate", ["--promt", "x"], "--prompt"),
        ("generate", ["--max_new_token", "3"], "--max_new_tokens"),
        ("prepare", ["--source", "x"], "--sources"),
        ("fitt", [], "fit"),
        ("bench", ["kernel"], "kernels"),
    ],
)
def test_an_unknown_name_is_refused_with_the_one_that_was_meant(
    workplace, monkeypatch, capsys, command, arguments, meant
):
    run_command = run_small if command == "fit" else run
    assert run_command(monkeypatch, command, *arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith(f"; did you mean {meant}?\n")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("data: {seqlen: 64}", "data.seq_len"),
        ("trainer: {max_step: 64}", "trainer.max_steps"),
        ("model: {transformer: {nsa: {windows_size: 64}}}", "model.transformer.nsa.window_size"),
        ("checkpoint: {dir_path: x}", "checkpoint.dirpath"),
    ],
)
def test_an_unknown_key_in_yaml_is_refused_with_the_one_that_was_meant(workplace, monkeypatch, capsys, written, meant):
    (workplace / "more.yaml").write_text(written)
    assert run_small(monkeypatch, "fit", "--config", "more.yaml") == 2
    assert capsys.readouterr().err.endswith(f"; did you mean {meant}?\n")


def test_a_name_that_is_like_no_other_has_no_suggestion(workplace, monkeypatch, capsys):
    assert run_small(monkeypatch, "fit", "--trainer.foo.bar", "3") == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainer.max_steps", "x"], "trainer.max_steps must be a whole number, got x"),
        (["--trainer.limit_val_batches", "x"],
         "trainer.limit_val_batches must be a whole number or a number, got x"),
        (["--model.optimizer", "Adamww"], "model.optimizer must be the name of a class, got Adamww"),
        (["--trainer.precision", "31"], "got 31"),
        (["--config", "missing.yaml"], "config: File does not exist"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_in_one_line(workplace, monkeypatch, capsys, arguments, message):
    assert run_small(monkeypatch, "fit", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert "Union" not in error


def test_words_after_a_flag_are_its_list_to_the_next_flag():
    types = {"--names": list[str], "--numbers": list[int], "--sources": Sequence[str] | str, "--other": str}
    words = ["--names", "*.c", "a b", "--numbers", "1", "2", "--names", "[x]", "--other", "y", "--names"]
    joined = ["--names", '["*.c", "a b"]', "--numbers", "[1, 2]", "--names", "[x]", "--other", "y", "--names", "[]"]
    assert join_lists(words, types, ["--names"]) == joined
    words = ["--sources", "a", "--sources", "a", "b", "--sources", "-c", "d", "--sources+", "e", "f"]
    joined = ["--sources", "a", "--sources", '["a", "b"]', "--sources", "-c", "d", "--sources+", '["e", "f"]']
    assert join_lists(words, types, ["-c", "--sources"]) == joined


def test_a_small_config_names_no_unknown_setting():
    assert yaml.safe_load(SMALL)["trainer"]["max_steps"] == 3
