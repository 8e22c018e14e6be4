"""`nsa bench decode` as a user types it, on the CPU and small; what it counts and how it judges."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_cli.main import main
from nsa_kernels import NSAConfig
from nsa_kernels.decode.attention import decode_attention

from nsa_lightning.benchmark import decode_checks, decode_layer, decode_model
from nsa_lightning.benchmark.cases import parse_shape
from nsa_lightning.benchmark.decode_checks import choice_gap
from nsa_lightning.benchmark.decode_layer import make_step, step_bytes, timed
from nsa_lightning.benchmark.decode_model import random_model, read_transformer_config, steps_at
from nsa_lightning.benchmark.decode_records import DecodeCase, DecodeRecord
from nsa_lightning.benchmark.decode_report import decode_tables, draw_decode
from nsa_lightning.benchmark.timing import Clock, Timing, if_supported
from nsa_lightning.generation.decoder import Decoder

CONFIG = """
model:
  transformer:
    hidden_size: 16
    num_layers: 2
    num_heads: 4
    num_kv_heads: 2
    intermediate_size: 16
    nsa: {compress_block_size: 8, compress_stride: 4, select_block_size: 8, num_selected_blocks: 4, window_size: 8}
data: {tokenizer: {vocab_size: 100}}
"""
SMALL = [
    "--shapes", "2x1x8x8", "--lengths", "70", "130", "--batch_sizes", "1", "3", "--prefill_lengths", "50",
    "--device", "cpu", "--dtype", "float32", "--check_lengths", "1", "31", "90", "1200",
    "--time_budget", "0.001", "--repetitions", "1", "--output_dir", "out",
]  # fmt: skip
CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = [(1, 70), (1, 130), (3, 70), (3, 130)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Exit status of `nsa bench decode *arguments` in a directory with a small config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(CONFIG)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["nsa", "bench", "decode", *SMALL, *arguments])
        try:
            return main()
        except SystemExit as stop:
            return stop.code

    return run


def records():
    return json.loads(Path("out/results.json").read_text())["records"]


def test_a_layer_and_a_model_are_measured_beside_full_attention(bench, capsys):
    assert bench("--config", "small.yaml") == 0
    text = capsys.readouterr().out
    for words in ("Floors: ", "decode_attention, shared keys", "nsa floor", "best", "small: a step of the whole model"):
        assert words in text
    assert sorted(path.name for path in Path("out").iterdir()) == ["decode.png", "results.json"]
    assert Path("out/decode.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads(Path("out/results.json").read_text())
    assert results["run"]["settings"]["batch_sizes"] == [1, 3]
    assert {check["stage"] for check in results["checks"]} >= {"append_tokens", "decode_dense_attention"}
    assert all(check["passed"] for check in results["checks"])
    found = {(row["kind"], row["method"], row["batch_size"], row["context"]): row for row in results["records"]}
    layer = {("layer", method, *size) for method in ("nsa separate", "nsa shared", "dense", "flash") for size in SIZES}
    model = {("model", method, *size) for method in ("nsa", "full") for size in SIZES}
    prefill = {("prefill", method, 1, 50) for method in ("nsa", "full")}
    timed = {name for name, row in found.items() if row["eager_ms"] is not None}
    assert timed == layer | model | prefill
    assert found.keys() - timed == {("layer", "cudnn", *size) for size in SIZES}
    assert all(row["graph_ms"] is None and (row["eager_ms"] or 1) > 0 for row in found.values())
    assert all(bool(row["reason"]) == (name not in timed) for name, row in found.items())
    assert found["layer", "nsa shared", 3, 130]["implementation"] == "eager"
    row = found["model", "nsa", 3, 130]
    assert row["tokens_per_second"] == pytest.approx(3e3 / row["eager_ms"])
    assert found["layer", "flash", 3, 130]["num_bytes"] == 3 * 4 * (130 + 2) * 16


def test_without_rivals_nothing_full_is_measured(bench):
    assert bench("--config", "small.yaml", "--rivals", "false", "--check", "false") == 0
    assert {row["method"] for row in records()} == {"nsa separate", "nsa shared", "nsa"}


def test_a_wrong_output_or_choice_ends_the_run_with_status_1_and_no_times(bench, monkeypatch, capsys):
    def wrong(out=0.0, block=0, longest=1.0):
        def attend(*arguments, backend):
            result = decode_attention(*arguments, backend=backend)
            if backend == "eager":
                return result
            blocks = result.block_indices.clone()
            blocks[-1, :, 5] += block
            result.out[-1] *= longest
            return result._replace(out=result.out + out, block_indices=blocks)

        return attend

    for change, stages in (
        ({"out": 0.1}, ["decode_attention, separate keys", "decode_attention, shared keys"]),
        ({"block": 1}, ["its blocks, separate keys", "its blocks, shared keys"]),
        ({"longest": 1.01}, ["decode_attention, separate keys", "decode_attention, shared keys"]),
        ({"out": float("nan")}, ["decode_attention, separate keys", "decode_attention, shared keys"]),
    ):
        monkeypatch.setattr(decode_checks, "decode_attention", wrong(**change))
        assert bench() == 1
        captured = capsys.readouterr()
        failed = ", ".join(f"2x1x8x8 {stage}" for stage in stages)
        assert captured.err.endswith(f"nothing was timed, these checks failed: {failed}\n")
        assert not Path("out").exists()


def test_a_choice_is_judged_by_the_importance_of_its_blocks():
    config = NSAConfig(num_selected_blocks=6)
    x = make_step(parse_shape("4x2x8x8"), [40, 1210], config, torch.float32, torch.device("cpu"))
    chosen = decode_attention(x.q, x.gates, x.separate, x.positions, config).block_indices
    assert choice_gap(x, chosen, chosen, config) == 0
    left = next(block for block in range(1, 17) if block not in chosen[1, 0])
    other = chosen.clone()
    other[1, 0] = torch.tensor([*chosen[1, 0, :1], *sorted([left, *chosen[1, 0, 2:4]]), *chosen[1, 0, 4:]])
    assert choice_gap(x, other, chosen, config) > 0.05
    alike = x._replace(q=torch.zeros_like(x.q))  # every inner block is as important as any other
    assert 0 <= choice_gap(alike, other, chosen, config) < 1e-6
    other[1, 0, 0] = -1
    assert choice_gap(x, other, chosen, config) == float("inf")


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 700), full=st.booleans(), window_size=st.integers(1, 80), n=st.integers(3, 9))
def test_the_bytes_counted_are_those_that_a_step_reads(length, full, window_size, n):
    shape, config = parse_shape("4x2x6x4"), NSAConfig(
        compress_block_size=8, compress_stride=4, select_block_size=16, num_selected_blocks=n, window_size=window_size
    )  # fmt: skip
    x = make_step(shape, [length, length], config, torch.float32, torch.device("cpu"))
    blocks = decode_attention(x.q, x.gates, x.separate, x.positions, config).block_indices
    keys = 2 * 2 * length
    if not full:
        chosen = sum(min(16, length - 16 * block) for block in blocks.flatten().tolist() if block >= 0)
        keys = chosen + 2 * 2 * (min(length, window_size) + sum(first + 8 <= length for first in range(0, length, 4)))
    gates = 0 if full else x.gates.numel()
    case = DecodeCase("layer", shape.name, "", 2, length)
    assert step_bytes(shape, case, config, full, 4) == 4 * (10 * keys + 10 * 2 * 4 + gates)


def test_what_does_not_fit_is_a_row_and_the_run_goes_on(bench, monkeypatch, capsys):
    quick = ["--config", "small.yaml", "--check", "false", "--rivals", "false", "--overwrite", "true"]
    monkeypatch.setattr(decode_layer, "free_memory", lambda device: 50_000)
    assert bench(*quick) == 0
    reasons = {(row["kind"], row["batch_size"], row["context"]): row["reason"] for row in records() if row["reason"]}
    assert set(reasons) == {("layer", 3, 130), ("layer", 3, 70), ("model", 3, 130)}
    assert reasons["layer", 3, 130] == "the cache takes 0.0 GB, 0.0 GB are free"

    def out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("out of memory: tried to allocate 9 GiB")

    monkeypatch.setattr(decode_layer, "free_memory", lambda device: 10**9)
    monkeypatch.setattr(decode_layer, "decode_attention", out_of_memory)
    monkeypatch.setattr(decode_model, "Decoder", out_of_memory)
    assert bench(*quick) == 0
    timed = {row["kind"] for row in records() if row["eager_ms"]}
    assert timed == {"prefill"}
    assert "- at 1 x 70, 1 x 130, 3 x 70, 3 x 130 tokens, model small, nsa: out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "tall"], "shapes must be of A, B, paper, smollm or like 64x4x192x128"),
        (["--shapes", "[]"], "shapes must name at least one where config names no model, got none"),
        (["--dtype", "int8"], "dtype must be of bfloat16, float16, float32, got 'int8'"),
        (["--backend", "fast"], "backend must be one of auto, "),
        (["--device", "abacus"], "device must be hardware that PyTorch can use, got 'abacus'"),
        (["--lengths", "0"], "lengths must be at least 1 each, got 0"),
        (["--batch_sizes", "-1"], "batch_sizes must be at least 1 each, got -1"),
        (["--batch_sizes", "8", "8"], "batch_sizes must name each value once, got 8 again"),
        (["--check_lengths", "[]"], "check_lengths must name at least one where check is set, got none"),
        (["--time_budget", "0"], "time_budget must be seconds above 0, got 0"),
        (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
        (["--output_dir", "used"], "output_dir must not hold decode.png yet, got used"),
        (["--config", "missing.yaml"], "config must be a config of nsa fit with model.transformer, got missing.yaml"),
        (["--config", "empty.yaml"], "config must be a config of nsa fit with model.transformer, got empty.yaml"),
        (["--config", "misspelt.yaml"], "hidden_sizes"),
        (["--config", "uneven.yaml"], "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line_before_anything_runs(bench, tmp_path, capsys, arguments, message):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "decode.png").touch()
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "misspelt.yaml").write_text(CONFIG.replace("hidden_size", "hidden_sizes"))
    (tmp_path / "uneven.yaml").write_text(CONFIG.replace("num_heads: 4", "num_heads: 3\n    head_dim: 4"))
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_the_model_of_every_shipped_config_is_read_with_its_vocabulary():
    found = {path.stem: read_transformer_config(path) for path in CONFIGS.glob("*.yaml")}
    assert {"quickstart", "nsa_1b", "nsa_70b", "nsa_paper"} <= found.keys()
    config = found["nsa_1b"]
    assert (config.vocab_size, config.num_layers, config.rope.factor) == (128256, 16, 32.0)


def test_steps_of_a_model_begin_where_they_began_and_complete_a_block_of_every_sequence(tmp_path):
    (tmp_path / "small.yaml").write_text(CONFIG)
    config = dataclasses.replace(read_transformer_config(tmp_path / "small.yaml"), attention=["nsa", "full"])
    decoder = Decoder(random_model(config, torch.float32, torch.device("cpu")), 3, 50 + 4, cuda_graphs=False)
    steps, summaries = steps_at(decoder, 50), decoder.cache.layers[0].summaries.k
    for _ in range(2):
        summaries.zero_()
        assert steps().isfinite().all()
        assert decoder.cache.lengths.tolist() == decoder.cache.host_lengths == [54, 53, 52]
        assert summaries[:, 11].any(-1).any(-1).all()  # of tokens 44 to 51
    assert len({tuple(row.flatten().tolist()) for row in decoder.cache.layers[1].tokens.k[:, :40]}) == 3


def test_what_precedes_a_call_runs_before_each_and_is_not_timed(monkeypatch):
    now, calls = [0.0], []

    def take(seconds):
        now[0] += seconds
        calls.append(seconds)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timing = Clock(torch.device("cpu"), time_budget=2.0, repetitions=1).measure(lambda: take(0.5), lambda: take(3.0))
    assert (timing.ms, timing.repetitions) == (500, 4)
    assert calls == [3.0, 0.5] * 6


def test_a_step_is_timed_as_a_graph_with_an_empty_cache_or_says_why_not(monkeypatch):
    done = []

    def measure(call, before=lambda: None):
        before()
        call()
        return Timing(float(len(done)), 1)

    clock = SimpleNamespace(device=torch.device("cuda"), measure=measure)
    bench = SimpleNamespace(clock=clock, flush=lambda: done.append("flush"))
    empty = DecodeRecord(case=DecodeCase("layer", "A", "", 1, 64), method="flash", full=True)
    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    monkeypatch.setattr(decode_layer, "capture", lambda step: graph)
    record = timed(bench, empty, lambda: done.append("step"), if_supported)
    assert (record.eager_ms, record.graph_ms, record.ms, record.reason) == (1, 3, 3, None)
    assert done == ["step", "flush", "replay"]

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_layer, "capture", refuse)
    record = timed(bench, empty, lambda: done.append("step"), if_supported)
    assert (record.eager_ms, record.graph_ms, record.ms) == (4, None, 4)
    assert record.reason == "CUDA graph: operation not permitted when stream is capturing"


@pytest.mark.gpu
def test_on_a_gpu_every_method_is_timed_as_a_cuda_graph_too(bench, tmp_path):
    sizes = "{select_block_size: 32, num_selected_blocks: 8, window_size: 64}"
    text = CONFIG.replace("num_heads: 4", "num_heads: 4\n    head_dim: 64")
    lines = [f"    nsa: {sizes}" if line.startswith("    nsa:") else line for line in text.splitlines()]
    (tmp_path / "gpu.yaml").write_text("\n".join(lines))
    arguments = ["--device", "cuda", "--dtype", "bfloat16", "--shapes", "smollm", "--config", "gpu.yaml"]
    assert bench(*arguments, "--lengths", "1024", "1500") == 0
    rows = [row for row in records() if row["kind"] != "prefill" and row["method"] != "cudnn"]
    assert {row["method"] for row in rows} == {"nsa separate", "nsa shared", "dense", "flash", "nsa", "full"}
    assert all(row["graph_ms"] > 0 and row["eager_ms"] > 0 and row["reason"] is None for row in rows)


def test_nsa_is_compared_with_the_fastest_full_attention_of_the_same_kind(tmp_path):
    case = DecodeCase("layer", "A", "shape A", 8, 65536)
    full = {"dense": (0.5, 0.4), "flash": (0.3, 0.29), "cudnn": (None, None)}
    measured = [DecodeRecord(case=case, method="nsa separate", full=False, eager_ms=0.1, graph_ms=0.02, floor_ms=0.01)]
    for method, (eager, graph) in full.items():
        reason = None if eager else "no kernel"
        times = {"eager_ms": eager, "graph_ms": graph, "floor_ms": 0.2, "reason": reason}
        measured.append(DecodeRecord(case=case, method=method, full=True, **times))
    title, _, row = decode_tables(measured).splitlines()[2:5]
    assert title.split()[-5:] == ["best", "vs", "eager", "vs", "graph"]
    assert row.split()[-7:] == ["0.010", "50%", "0.200", "69%", "flash", "3.00x", "14.5x"]
    assert "- at 8 x 65536 tokens, layer A, cudnn: no kernel" in decode_tables(measured)
    alone = [dataclasses.replace(record, eager_ms=None, graph_ms=None) for record in measured]
    draw_decode(alone, "nothing", tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")
