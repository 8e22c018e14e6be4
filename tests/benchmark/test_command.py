"""`nsa bench kernels` as a user types it, on the CPU and small."""

import json
import subprocess
import sys

import pytest
import torch
from nsa_cli.main import main

from nsa_lightning.benchmark import checks, measure
from nsa_lightning.benchmark.cases import parse_shape
from nsa_lightning.benchmark.stages import stage_functions
from nsa_lightning.benchmark.timing import Clock

SMALL = [
    "--shapes", "2x1x8x8", "--lengths", "300", "600", "--documents", "one", "--device", "cpu", "--backend", "eager",
    "--dtype", "float32", "--check_documents", "1", "40", "90", "--time_budget", "0.001", "--repetitions", "1",
]  # fmt: skip
STAGES = ["compress", "compressed_attention", "block_selection", "selected_attention", "sliding_attention"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Exit status of `nsa bench *arguments` in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nsa", "bench", *arguments])
        try:
            return main()
        except SystemExit as stop:
            return stop.code

    return run


def test_it_prints_tables_and_writes_json_and_a_plot(bench, tmp_path, capsys):
    assert bench("kernels", *SMALL, "--output_dir", "out") == 0
    text = capsys.readouterr().out
    for words in (
        "sliding_attention",
        "ok",
        "Floors: ",
        "random inputs",
        "overlap inputs",
        "union 2/4/8/16",
        "flash",
        "Plan of shape",
    ):
        assert words in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["kernels.png", "results.json"]
    assert (tmp_path / "out" / "kernels.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    assert data["run"]["settings"]["lengths"] == [300, 600]
    assert {"device", "torch", "triton"} <= data["run"]["environment"].keys()
    assert all(check["passed"] for check in data["checks"])
    nsa = [row for row in data["records"] if row["method"] == "nsa" and row["inputs"] == "random"]
    assert [row["stage"] for row in nsa[:7]] == ["whole", *STAGES, "gates and rest"]
    for row in nsa[:6]:
        assert row["forward_ms"] > 0
        assert row["forward_floor_ms"] > 0
        assert (row["backward_ms"] is None) == (row["stage"] == "block_selection")
    assert nsa[0]["implementation"] == "eager"


def test_rivals_are_timed_once_for_all_inputs_or_say_why_not(bench, tmp_path):
    assert bench("kernels", *SMALL, "--stages", "false", "--check", "false", "--output_dir", "out") == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    flash, cudnn = ([row for row in records if row["method"] == name] for name in ("flash", "cudnn"))
    assert [row["tokens"] for row in flash] == [300, 600]
    assert all(row["forward_ms"] > 0 and row["backward_ms"] > 0 and row["reason"] is None for row in flash)
    assert all(row["forward_ms"] is None and row["reason"] for row in cudnn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "A", "tall"], "shapes must be of A, B, paper, smollm or like 64x4x192x128"),
        (["--shapes", "9x2x64x64"], "shapes must have a multiple of the KV heads as query heads, got '9x2x64x64'"),
        (["--dtype", "int8"], "dtype must be of bfloat16, float16, float32, got 'int8'"),
        (["--documents", "many"], "documents must be of one, mixed, equal_1k, got 'many'"),
        (["--inputs", "real"], "inputs must be of random, overlap, got 'real'"),
        (["--backend", "fast"], "backend must be one of auto, "),
        (["--device", "cuda"], "device must be hardware that PyTorch can use, got 'cuda'"),
        (["--device", "abacus"], "device must be hardware that PyTorch can use, got 'abacus'"),
        (["--lengths", "0"], "lengths must be at least 1 token each, got 0"),
        (["--lengths", "[]"], "lengths must name at least one, got none"),
        (["--lengths", "64", "64"], "lengths must name each value once, got 64 again"),
        (["--lengths", "many"], "lengths"),
        (["--time_budget", "0"], "time_budget must be seconds above 0, got 0"),
        (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
        (["--output_dir", "used"], "output_dir must not hold results.json yet, got used"),
        (["--repetition", "3"], "repetition"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line_before_anything_runs(bench, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "results.json").write_text("{}")
    if arguments[:2] == ["--device", "cuda"] and torch.cuda.device_count():
        pytest.skip("there is a GPU")
    assert bench("kernels", *SMALL, *arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_results_are_replaced_only_on_demand(bench, tmp_path):
    quick = [*SMALL, "--check", "false", "--stages", "false", "--rivals", "false", "--output_dir", "out"]
    assert bench("kernels", *quick) == 0
    assert bench("kernels", *quick) == 2
    assert bench("kernels", *quick, "--lengths", "200", "--overwrite", "true") == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["run"]["settings"]["lengths"] == [200]


def test_a_wrong_stage_ends_the_run_with_status_1_and_no_times(bench, tmp_path, monkeypatch, capsys):
    def wrong_stages(*arguments):
        stages = stage_functions(*arguments)

        def wrong(*tensors):
            o, lse = stages.sliding_attention(*tensors)
            return o + 0.1, lse

        return stages._replace(sliding_attention=wrong)

    monkeypatch.setattr(checks, "stage_functions", wrong_stages)
    assert bench("kernels", *SMALL, "--output_dir", "out") == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.out.splitlines() if "2x1x8x8 sliding_attention" in line]
    assert "FAILED" in line
    assert "2x1x8x8 sliding_attention" in captured.err
    assert not (tmp_path / "out").exists()


def test_a_case_that_does_not_fit_is_recorded_and_the_run_goes_on(bench, tmp_path, monkeypatch, capsys):
    whole = measure.native_sparse_attention

    def too_large(q, *arguments, **options):
        if len(q) == 600:
            raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB")
        return whole(q, *arguments, **options)

    monkeypatch.setattr(measure, "native_sparse_attention", too_large)
    quick = ["--check", "false", "--stages", "false", "--rivals", "false", "--inputs", "random"]
    assert bench("kernels", *SMALL, *quick, "--lengths", "600", "300", "--output_dir", "out") == 0
    large, small = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert large["forward_ms"] is None
    assert large["reason"] == "out of memory: tried to allocate 9 GiB"
    assert small["forward_ms"] > 0
    assert "at T 600, nsa: out of memory" in capsys.readouterr().out


def test_the_median_of_as_many_repetitions_as_fit_is_reported(monkeypatch):
    ticks = iter([0.0, 0.1, *(t for i in range(5) for t in (i, i + (0.5 if i == 4 else 0.1)))])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    timing = Clock(torch.device("cpu"), time_budget=0.55, repetitions=3).measure(lambda: None)
    assert timing.repetitions == 5
    assert timing.ms == pytest.approx(100)


def test_a_shape_of_ones_own_is_read():
    assert parse_shape("8x2x192x128")[1:] == (8, 2, 192, 128)
    assert parse_shape("A").group_size == 16


def test_help_explains_every_setting_without_importing_torch():
    code = "import sys; from nsa_cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    for words, expected in (
        (["bench", "--help"], ["kernels", "nsa bench kernels --shapes A"]),
        (["bench", "kernels", "--help"], ["--shapes", "64 query heads on 4 KV heads", "--time_budget", "log-uniform"]),
        (
            ["bench", "decode", "--help"],
            ["--batch_sizes", "64 query heads on 4 KV heads", "whose model is measured too"],
        ),
    ):
        command = [sys.executable, "-c", code, *words]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        text = " ".join(result.stdout.split())
        assert all(word in text for word in expected)


def test_an_unknown_benchmark_lists_those_there_are(bench, capsys):
    assert bench("speed") == 2
    assert "no benchmark 'speed'; the benchmarks are kernels, decode, loader, training" in capsys.readouterr().err
