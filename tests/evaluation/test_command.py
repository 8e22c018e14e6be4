"""`nsa evaluate` as a user types it, on tiny models."""

import json
import subprocess
import sys

import pytest
from support.checkpoints import write_checkpoints
from support.command_line import run as run_command
from support.dense import write_source
from support.training import NSA

from nsa_lightning.checkpoint.convert import RopeChange, convert
from nsa_lightning.checkpoint.export import export
from nsa_lightning.evaluation.results import ResultFile
from nsa_lightning.generation.decoder import Decoder

pytestmark = pytest.mark.slow
SMALL = ("--lengths", "700", "--needle.depths", "0", "1", "--device", "cpu")


def run(monkeypatch, *words):
    """Exit status of `nsa evaluate *words`."""
    return run_command(monkeypatch, "evaluate", *words)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense model for 1024 tokens, an NSA model made of it, and that as everything that writes models writes it."""
    folder = tmp_path_factory.mktemp("models")
    write_source(folder / "dense", "llama_tied", tokenizer=True, max_position_embeddings=1024)
    convert(folder / "dense", folder / "made", ["nsa"], NSA, RopeChange(), 1024, None, 0)
    write_checkpoints(folder / "made", folder / "run")
    export(folder / "run" / "checkpoints" / "last.ckpt", folder / "exported", None, None)
    return folder


def lines_of(directory):
    return [json.loads(line) for line in (directory / "cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["dense", "made"])
def test_a_run_writes_cases_a_table_and_pictures(models, tmp_path, monkeypatch, capsys, name):
    assert run(monkeypatch, "--model", models / name, *SMALL, "--output_dir", tmp_path / "out") == 0
    method = {"dense": "full", "made": "nsa"}[name]
    cases = [line for line in lines_of(tmp_path / "out") if line["kind"] == "case"]
    assert [case["case"] for case in sorted(cases, key=lambda case: case["depth"])] == ["700/0/0", "700/1/0"]
    mean = sum(case["scores"]["log_probability"] for case in cases) / 2
    assert f"{method}  {mean:.3f}" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["scores"]["score"] for row in summary["rows"]] == [case["scores"]["score"] for case in cases]
    assert summary["methods"] == {method: {}}
    for picture in ("needle_single.png", "quality_by_length.png", "quality_by_cost.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_a_model_is_measured_alike_in_whatever_form_it_is_kept(models, tmp_path, monkeypatch):
    rows = []
    for number, name in enumerate(["made", "exported", "run", "run/checkpoints/sharded.ckpt"]):
        assert run(monkeypatch, "--model", models / name, *SMALL, "--output_dir", tmp_path / str(number)) == 0
        rows.append(json.loads((tmp_path / str(number) / "summary.json").read_text())["rows"])
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert len(rows[0]) == 2


def test_a_killed_run_goes_on_without_what_it_has(models, tmp_path, monkeypatch):
    words = ("--model", models / "dense", *SMALL, "--needle.samples", "2", "--batch_size", "1")
    assert run(monkeypatch, *words, "--output_dir", tmp_path / "whole") == 0
    add = ResultFile.add

    def add_two(self, result):
        add(self, result)
        if len(self.cases) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFile, "add", add_two)
    assert run(monkeypatch, *words, "--output_dir", tmp_path / "killed") == 130
    monkeypatch.setattr(ResultFile, "add", add)
    with (tmp_path / "killed" / "cases.jsonl").open("a") as stream:
        stream.write('{"kind": "case", "key": "to')  # as a kill within a write leaves it
    begun, begin = [], Decoder.begin
    monkeypatch.setattr(Decoder, "begin", lambda self, *given: begun.append(given) or begin(self, *given))
    assert run(monkeypatch, *words, "--output_dir", tmp_path / "killed") == 0
    assert len(begun) == 2

    def results(directory):
        return sorted(
            (line["case"], line["answer"], str(line["scores"])) for line in lines_of(directory) if "case" in line
        )

    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert len(results(tmp_path / "whole")) == 4


def test_results_of_other_settings_are_not_mixed(models, tmp_path, monkeypatch):
    words = ("--model", models / "dense", *SMALL, "--output_dir", tmp_path / "out")
    assert run(monkeypatch, *words) == 0
    first = (tmp_path / "out" / "summary.json").read_text()
    assert run(monkeypatch, *words, "--needle.seed", "5") == 0
    assert len([line for line in lines_of(tmp_path / "out") if line["kind"] == "case"]) == 4
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]) == 2
    begin = Decoder.begin
    monkeypatch.setattr(Decoder, "begin", None)  # nothing is asked again
    assert run(monkeypatch, *words) == 0
    assert (tmp_path / "out" / "summary.json").read_text() == first
    monkeypatch.setattr(Decoder, "begin", begin)
    assert run(monkeypatch, *words, "--overwrite", "true") == 0
    assert len([line for line in lines_of(tmp_path / "out") if line["kind"] == "case"]) == 2


def test_sparse_methods_stand_beside_the_model_s_own_layers(models, tmp_path, monkeypatch, capsys):
    words = (
        "--model",
        models / "dense",
        *SMALL,
        "--methods",
        "full,exact_top,sliding",
        "--output_dir",
        tmp_path / "out",
    )
    small = ("--method.leading", "16", "--method.local", "32", "--method.dense_layers", "1", "--budget")
    assert run(monkeypatch, *words, *small, "700") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {name: [row["scores"] for row in summary["rows"] if row["method"] == name] for name in summary["methods"]}
    assert list(rows) == ["full", "exact_top", "sliding"]
    for name in ("exact_top", "sliding"):  # the budget holds the whole text
        for one, other in zip(rows["full"], rows[name], strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert summary["methods"]["exact_top"]["budget"] == 700
    statistics = {cost["method"]: cost["statistics"] for cost in summary["costs"]}
    assert statistics["exact_top"]["mass"] == pytest.approx(1.0)
    assert "exact_top: budget 700, leading 16, local 32" in capsys.readouterr().out
    assert run(monkeypatch, *words, *small, "64") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    found = {cost["method"]: cost["statistics"]["mass"] for cost in summary["costs"] if cost["statistics"]}
    assert found["sliding"] < found["exact_top"] < 1
    assert [row["scores"] for row in summary["rows"] if row["method"] == "full"] == rows["full"]


def test_finished_runs_are_laid_side_by_side(models, tmp_path, monkeypatch, capsys):
    for name in ("dense", "made"):
        assert run(monkeypatch, "--model", models / name, *SMALL, "--output_dir", tmp_path / name) == 0
    capsys.readouterr()
    assert run(monkeypatch, "--table", tmp_path / "dense", tmp_path / "made" / "summary.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[4:6]] == ["dense full", "made nsa"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "nedle"], "tasks must be of needle"),
        (["--maps", "needle"], "maps need nsa layers, the model has full alone"),
        (["--lengths", "2048"], "lengths must be within the 1024 tokens that the model is made for"),
        (["--lengths", "200"], "lengths must leave room for the needles and the question, got 200"),
        (["--lengths", "0"], "lengths must be one or more numbers of at least 1, got [0]"),
        (["--methods", "best"], "methods must be of full, exact_top"),
        (["--methods", "quest", "--budget", "600"], "budget must hold the leading and local tokens, got 600"),
        (["--model", "gone"], "model must be a checkpoint of nsa fit or a directory"),
        (["--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--needle.depths", "2"], "needle.depths must be from 0 to 1, got [2.0]"),
        (["--needle.haystack", "gone.txt"], "haystack must be one of filler, repeat or a text file, got gone.txt"),
        (["--chat", "true"], "chat must be false where the tokenizer has no chat template"),
        (["--table", "gone.json"], "table must name summaries of nsa evaluate, got gone.json"),
        (["--device", "cuda:7"], "device must be one that PyTorch can use, got cuda:7"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_ends_in_one_line_before_anything_is_loaded(models, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nsa_lightning.generation.text_model.TextModel.load", None)
    model = [] if "--model" in words else ["--model", models / "dense"]
    device = [] if "--device" in words else ["--device", "cpu"]
    assert run(monkeypatch, *model, *words, *device) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_training_imports_nothing_of_the_extra():
    modules = "nsa_cli.trainer_commands, nsa_cli.evaluate, nsa_lightning.evaluation.callback"
    program = f"import sys, {modules}; print(*{{'lm_eval', 'math_verify', 'jieba', 'rouge'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert done.stdout == "\n"


def test_without_a_model_there_is_nothing_to_do(monkeypatch, capsys):
    assert run(monkeypatch, "--tasks", "needle") == 2
    assert "model must be given" in capsys.readouterr().err
