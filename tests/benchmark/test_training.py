"""`nsa bench training` as a user types it, on the CPU and small."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nsa_cli.main import main

from nsa_lightning.benchmark import training
from nsa_lightning.benchmark.training_cases import TrainingCase
from nsa_lightning.benchmark.training_report import TrainingRecord, draw_training, training_table
from nsa_lightning.benchmark.training_step import RandomBatches, nccl_alone
from nsa_lightning.data.batch import IGNORE_INDEX

CONFIG = """
trainer: {accelerator: cpu, devices: 1, max_steps: 100, accumulate_grad_batches: 2, val_check_interval: 50}
model:
  transformer:
    hidden_size: 16
    num_layers: 2
    num_heads: 4
    num_kv_heads: 2
    intermediate_size: 16
    nsa: {compress_block_size: 8, compress_stride: 4, select_block_size: 8, num_selected_blocks: 4, window_size: 8}
data: {sources: [nowhere/*.txt], tokenizer: {vocab_size: 300}, batch_size: 3}
"""
QUICK = ["--steps", "2", "--warmup_steps", "1", "--output_dir", "out"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Exit status of `nsa bench training *arguments` in a directory with a small config."""
    monkeypatch.chdir(tmp_path)
    paths = [entry for entry in sys.path if entry]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    (tmp_path / "small.yaml").write_text(CONFIG)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nsa", "bench", "training", "--config", "small.yaml", *QUICK, *arguments])
        try:
            return main()
        except SystemExit as stop:
            return stop.code

    return run


@pytest.mark.slow
def test_ranks_that_share_a_batch_are_measured_as_one(bench, tmp_path, capsys):
    shared = ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.context_parallel_size", "2"]
    arguments = ["--lengths", "64", "--attention", "nsa", "--devices", "2", "--documents", "mixed", *shared]
    assert bench(*arguments, "--profile", "true") == 0
    text = capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.json", "training.png"]
    assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = results["records"]
    assert (row["world_size"], row["ranks_a_batch"], row["tokens"]) == (2, 2, 64 * 3 * 2)  # 3 sequences, 2 batches
    assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["step_ms"])
    assert row["tokens_per_second_per_gpu"] == pytest.approx(row["tokens_per_second"] / 2)
    assert {"device", "torch"} <= results["environment"].keys()
    assert f"{row['tokens_per_second']:,.0f}" in text


def test_a_case_that_takes_too_long_is_a_row_and_leaves_no_process(bench, tmp_path, monkeypatch, capsys):
    started, popen = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    assert bench("--lengths", "64", "--attention", "full", "--time_limit", "0.2") == 1
    assert "- full, 64 tokens: not done within 0.2 s; see out/case00.log" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    assert row["reason"].startswith("not done within")
    assert [process.poll() for process in started] == [-9]


@pytest.mark.slow
def test_a_mistake_in_the_settings_of_fit_ends_the_run_in_one_line(bench, capsys):
    assert bench("--lengths", "4", "--attention", "nsa") == 2
    error = capsys.readouterr().err
    assert "error: max_seq_len (data.seq_len) must be at least nsa.compress_block_size, got 4 and 8 (case nsa" in error
    assert "Traceback" not in error


def pretend(outcomes):
    """A launch that runs nothing: by length, what a case writes beside its result and the status it ends with."""

    def launch(command, time_limit, log):
        flags = dict(itertools.pairwise(command))
        name, text, status = outcomes[int(flags["--data.seq_len"])]
        log.write_text("starting\nlast words\n")
        if name:
            Path(flags["--step.result"]).with_name(name).write_text(text)
        return status

    return launch


def test_cases_that_fail_say_why_and_the_others_go_on(bench, tmp_path, monkeypatch):
    result = {"world_size": 1, "ranks_a_batch": 1, "tokens": 16, "step_ms": 2.0, "mean_step_ms": 2.0, "mfu": None}
    result |= {"peak_bytes": None, "nccl_alone": None, "environment": {"device": "abacus"}}
    memory = "out of memory: tried to allocate 9 GiB"
    outcomes = {
        64: ("failure1", memory, 1),
        32: (None, "", -9),
        16: ("results.json", json.dumps(result), 0),
        8: ("failure0", "DistBackendError: NCCL error", 1),
    }
    monkeypatch.setattr(training, "_launch", pretend(outcomes))
    assert bench("--lengths", "64", "32", "16", "8", "--attention", "nsa") == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    reasons = [row["reason"] and row["reason"].partition("; see out/case")[0] for row in rows]
    assert reasons == [memory, "ended with status -9: last words", None, "DistBackendError: NCCL error"]
    assert rows[2]["tokens_per_second"] == 8000
    assert sorted(path.name for path in (tmp_path / "out").glob("*.log")) == ["case00.log", "case01.log", "case03.log"]


def record(attention, devices, step_ms, tokens=1024):
    step = {"world_size": devices, "ranks_a_batch": 1, "tokens": tokens * devices, "step_ms": step_ms, "mfu": 0.25}
    step |= {"peak_bytes": 5 * 10**9, "nccl_alone": None, "environment": {"device": "abacus"}}
    case = TrainingCase(tokens, attention, devices, None)
    return TrainingRecord(case=case, step=step) if step_ms else TrainingRecord(case=case, reason="out of memory")


def test_efficiency_is_against_the_fewest_gpus_and_speed_against_full_attention(tmp_path):
    records = [record("nsa", 1, None), record("nsa", 2, 10.0), record("nsa", 4, 12.5), record("full", 2, 40.0)]
    assert [r.efficiency(records) for r in records] == [None, 1.0, pytest.approx(0.8), 1.0]
    assert [r.against_full(records) for r in records] == [None, pytest.approx(4.0), None, None]
    table = training_table(records)
    assert "compile" not in table
    assert table.splitlines()[2].split() == [
        "attention,", "tokens", "GPUs", "step", "ms", "tokens/s", "tokens/s/GPU", "MFU", "peak", "GB", "vs", "full",
        "efficiency",
    ]  # fmt: skip
    assert "- nsa, 1024 tokens, 1 device: out of memory" in table
    draw_training(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_every_process_makes_the_same_batches_and_no_target_crosses_a_document():
    batch, again = (RandomBatches(300, [5, 3, 8], 2)[1] for _ in range(2))
    assert torch.equal(batch.tokens, again.tokens)
    assert not torch.equal(batch.tokens, RandomBatches(300, [5, 3, 8], 2)[0].tokens)
    assert batch.cu_seqlens.tolist() == [0, 5, 8, 16]
    assert batch.positions.tolist() == [*range(5), *range(3), *range(8)]
    ends = batch.cu_seqlens[1:].long() - 1
    assert (batch.targets[ends] == IGNORE_INDEX).all()
    inner = torch.ones(16, dtype=torch.bool).index_fill(0, ends, False)
    assert torch.equal(batch.targets[inner], batch.tokens.roll(-1)[inner])


def test_time_in_which_a_gpu_only_communicates_is_told_from_time_in_which_it_also_computes():
    kernels = [("gemm", (0, 40)), ("ncclDevKernel_AllGather", (30, 60)), ("ncclDevKernel_SendRecv", (50, 70))]
    assert nccl_alone([*kernels, ("gemm", (65, 100))]) == pytest.approx(0.25)  # from 40 to 65
    assert nccl_alone(kernels[:1]) == 0
    assert nccl_alone([]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "0"], "lengths must be at least 1, got 0"),
        (["--devices", "2", "2"], "devices must name each value once, got 2 again"),
        (["--warmup_steps", "0"], "warmup_steps must be at least 1, got 0"),
        (["--time_limit", "0"], "time_limit must be seconds above 0, got 0"),
        (["--documents", "many"], "documents must be of one, mixed, equal_1k, got 'many'"),
        (["--output_dir", "small.yaml"], "output_dir must be a directory, got the file small.yaml"),
        (["--step", "3"], "step"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line_before_anything_runs(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.delattr(training, "_launch")
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_help_explains_every_setting_without_importing_torch():
    code = "import sys; from nsa_cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "bench", "training", "--help"]
    text = " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert all(words in text for words in ("--lengths", "weak scaling", "--fit", "MFU"))


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_gpu_tells_its_memory_and_how_much_of_its_peak_is_used(bench, tmp_path, strategy):
    arguments = ["--lengths", "4096", "--attention", "nsa", "full", "--devices", "1", "--profile", "true"]
    arguments += ["--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed", "--trainer.strategy", strategy]
    wide = ["--model.transformer.hidden_size", "256", "--model.transformer.nsa.select_block_size", "64"]
    assert bench(*arguments, *wide) == 0
    for row in json.loads((tmp_path / "out" / "results.json").read_text())["records"]:
        assert row["reason"] is None
        assert 0 < row["step_ms"] < 1e4
        assert row["peak_bytes"] > 1e7
        assert row["mfu"] is None or 0 < row["mfu"] < 1
        assert 0 <= row["nccl_alone"] < 0.5
