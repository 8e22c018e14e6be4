"""Runs are compared at equal tokens and at equal time."""

import json

import pytest
import yaml
from nsa_cli.main import main
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from nsa_lightning.benchmark.study import at, read_run

SETTINGS = {"data": {"seq_len": 1000, "batch_size": 2}, "trainer": {"accumulate_grad_batches": 5}}


def write_run(root, name, validations, *, seconds_a_step=36.0, version=0):
    """A run of 10,000 tokens a step: {step: {tag: value}}, each `seconds_a_step` after the one before."""
    directory = root / name / f"version_{version}"
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    writer = EventFileWriter(str(directory))
    for step, values in {0: {"train/loss": 9.0}, **validations}.items():
        for tag, value in values.items():
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(wall_time=1e9 + seconds_a_step * step, step=step, summary=summary))
    writer.close()


def losses(*values):
    """Validations after 100, 200, … steps, whose last step is counted from 0."""
    return {100 * (index + 1) - 1: {"val/loss": value} for index, value in enumerate(values)}


def test_losses_stand_at_the_tokens_and_the_time_that_all_runs_have(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "slow", losses(4.0, 3.0, 2.0), seconds_a_step=36.0)  # 99 steps an hour's 0.99
    write_run(tmp_path, "fast", losses(5.0, 4.0, 3.5, 3.0), seconds_a_step=18.0)
    monkeypatch.setattr("sys.argv", ["nsa", "bench", "study", "--runs_dir", str(tmp_path)])
    assert main() == 0
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:4]}
    # tokens in millions, hours, last loss, after 3 M tokens, after 1.995 hours (halfway between 2 and 3 validations)
    assert table["fast"] == ["4.00", "2.00", "3.000", "3.500", "3.000"]
    assert table["slow"][:4] == ["3.00", "2.99", "2.000", "2.000"]
    assert float(table["slow"][4]) == pytest.approx(2.995, abs=0.006)
    assert (tmp_path / "study.png").stat().st_size > 10_000
    assert {row["name"] for row in json.loads((tmp_path / "study.json").read_text())["records"]} == {"slow", "fast"}


def test_copying_is_dated_by_the_first_validation_below_half_of_the_first(tmp_path):
    copying = [9.0, 8.0, 4.4, 1.0]
    validations = losses(4.0, 3.0, 2.0, 1.0)
    for values, loss in zip(validations.values(), copying, strict=True):
        values |= {"val/copying/64": loss, "val/copying/128": 9.0}
    write_run(tmp_path, "run", validations)
    run = read_run(tmp_path / "run")
    assert run.copied_after(64) == pytest.approx(3.0)  # 300 steps of 10,000 tokens
    assert run.copied_after(128) is None


def test_the_newest_version_of_a_run_counts(tmp_path):
    write_run(tmp_path, "run", losses(4.0), version=2)
    write_run(tmp_path, "run", losses(3.0), version=10)
    assert read_run(tmp_path / "run").values["val/loss"] == [3.0]


def test_a_curve_has_no_values_outside_of_its_points():
    curve = [(1.0, 4.0), (3.0, 2.0)]
    assert [at(curve, x) for x in (0.5, 1.0, 2.0, 3.0, 3.5)] == [None, 4.0, 3.0, 2.0, None]


def test_a_directory_without_runs_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["nsa", "bench", "study", "--runs_dir", str(tmp_path)])
    assert main() == 2
    assert "runs_dir must hold runs of nsa fit that validated" in capsys.readouterr().err
