"""`nsa prepare` as a user types it."""

import logging
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
from nsa_cli.main import main

from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.token_store import TokenStore


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty directory to work in, with some texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for index in range(12):
        (tmp_path / "texts" / f"{index}.txt").write_text(f"document {index} counts: " + " ".join(map(str, range(90))))
        (tmp_path / "texts" / f"{index}.md").write_text(f"# {index}")
    return tmp_path


def prepare(monkeypatch, *arguments):
    """Exit status of `nsa prepare *arguments`."""
    monkeypatch.setattr(sys, "argv", ["nsa", "prepare", *arguments])
    try:
        return main()
    except SystemExit as stop:
        return stop.code


SMALL = ("--sources", "texts", "--tokenizer.vocab_size", "300", "--output_dir", "set")


def test_a_set_is_made_told_and_verified(workplace, monkeypatch, capsys):
    assert prepare(monkeypatch, *SMALL, "--val_fraction", "0.2") == 0
    assert "nsa fit --config " in capsys.readouterr().out
    assert TokenStore(workplace / "set").manifest.num_documents == 24
    assert prepare(monkeypatch, "--output_dir", "set", "--verify", "true") == 0
    path = next(workplace.glob("set/shards/*/train.bin"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x5a")
    assert prepare(monkeypatch, "--output_dir", "set", "--verify", "true") == 2
    assert f"{path.relative_to(workplace)} must have checksum" in capsys.readouterr().err


@pytest.mark.parametrize("installed", [False, True])
def test_the_last_line_works_when_it_is_pasted(workplace, monkeypatch, capsys, installed):
    if installed:  # a package has no configs
        (workplace / "site-packages").mkdir()
        monkeypatch.setattr("nsa_cli.prepare.__file__", f"{workplace}/site-packages/nsa_cli/x.py")
    output = workplace / "my set's"
    assert prepare(monkeypatch, *SMALL[:-1], str(output), "--val_fraction", "0.2") == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("train on it: nsa fit --")
    assert ("--trainer.max_steps" in line) == installed
    sizes = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
    small = [f"--model.transformer.{name}={size}" for name, size in sizes.items()]
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.accelerator=cpu"]
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning logs to the stderr of the first test, closed now
    quiet = [
        "--trainer.enable_progress_bar=false",
        "--trainer.logger=false",
        "--data.seq_len=128",
        "--data.num_workers=0",
    ]
    monkeypatch.setattr(sys, "argv", [*shlex.split(line.removeprefix("train on it: ")), *small, *limits, *quiet])
    assert main() == 0


def test_a_set_that_cannot_be_trained_on_offers_no_line_to_paste(workplace, monkeypatch, capsys):
    assert prepare(monkeypatch, *SMALL, "--val_fraction", "0.9999", "--test_fraction", "0") == 0
    said = capsys.readouterr().out
    assert "no document fell to train: lower --val_fraction and --test_fraction" in said
    assert "train on it" not in said


def test_a_split_that_stays_empty_unasked_is_told(workplace, monkeypatch, capsys):
    assert prepare(monkeypatch, *SMALL, "--val_fraction", "0.0001", "--test_fraction", "0") == 0
    said = capsys.readouterr().out
    assert "no document fell to val: raise --val_fraction, 0.0001 here, set it to 0 or prepare more documents" in said
    assert "train on it" not in said
    assert "fell to test" not in said


def test_lists_are_words_or_yaml(workplace, monkeypatch):
    assert prepare(monkeypatch, *SMALL, "--include", "**/*.txt", "1.md", "--exclude", "1*.txt", "2.txt") == 0
    assert TokenStore(workplace / "set").manifest.num_documents == 12 - 3 - 1 + 1
    again = (*SMALL[:-1], "again", "--include", '["**/*.txt"]')
    assert prepare(monkeypatch, *again) == 0
    assert TokenStore(workplace / "again").manifest.num_documents == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output_dir", "set"], "sources must name files, directories, globs or URLs, got none"),
        (["--sources", "texts"], "output_dir"),
        ([*SMALL, "--shard_sise", "9"], "shard_sise"),
        ([*SMALL, "--num_workers", "-1"], "num_workers must be at least 0, got -1"),
        ([*SMALL, "--tokenizer.vocab_size", "3"], "vocab_size must be at least 257, got 3"),
        ([*SMALL, "--tokenizer.path", "missing.json"], "missing.json"),
        ([*SMALL, "--output_dir", "s3://bucket/set"], "output_dir must be a local directory, got s3://bucket/set"),
        ([*SMALL, "--output_dir", "texts/1.txt"], "texts/1.txt cannot be written: File exists"),
        ([*SMALL, "--sources", "texts", "nowhere/*.c"], "'nowhere/*.c' matches none"),
        (["--output_dir", "texts", "--verify", "true"], "texts is not a whole prepared set, it has no manifest.json"),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(workplace, monkeypatch, capsys, arguments, message):
    assert prepare(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("nsa prepare: error: ")
    assert len(error.splitlines()) == 1


def test_the_help_explains_every_setting_without_importing_torch():
    code = "import sys; sys.argv = ['nsa', 'prepare', '--help']; from nsa_cli.main import main\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = " ".join(result.stdout.split())
    assert all(f"--{field.name} " in text for field in fields(TextSettings))
    for words in "--tokenizer.vocab_size VOCAB_SIZE Number of tokens", "--shard_size SHARD_SIZE bytes of text", "s3fs":
        assert words in text
