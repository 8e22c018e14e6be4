"""The `nsa` command as a user types it; every mistake ends in one line that names it."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nsa_cli.main
import pytest
import torch
import yaml
from support.command_line import LOGGED, SMALL, run, run_small
from support.runs import TELLS_SAVES, start, wait_until_saved

from nsa_lightning.memory import simulated_gpu
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer

CONFIGS = Path(__file__).parents[2] / "configs"


def test_validate_and_predict_read_what_fit_wrote(workplace, monkeypatch, capsys):
    assert run_small(monkeypatch, "fit", *LOGGED) == 0
    (config,) = workplace.glob("runs/**/config.yaml")
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    assert run(monkeypatch, "validate", "--config", str(config), "--ckpt_path", str(checkpoint)) == 0
    assert "val/bits_per_byte" in capsys.readouterr().out
    options = ("--generate.max_new_tokens", "6", "--generate.prompt_tokens", "8")
    assert run(monkeypatch, "predict", "--config", str(config), "--ckpt_path", str(checkpoint), *options) == 0
    assert list(workplace.rglob("document_scores.jsonl"))
    (continuations,) = workplace.rglob("continuations.jsonl")
    documents = [path.read_text() for path in workplace.glob("texts/*.txt")]
    lines = [json.loads(line) for line in continuations.read_text().splitlines()]
    assert lines
    for line in lines:
        assert min(len(line[name]) for name in ("prompt", "continuation", "true")) > 0
        assert any(line["prompt"] + line["true"] in document for document in documents)


def test_a_measurement_without_a_logger_leaves_no_file(workplace, monkeypatch, capsys):
    assert run_small(monkeypatch, "fit", *LOGGED) == 0
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    before = set(workplace.rglob("*"))
    assert run_small(monkeypatch, "validate", "--ckpt_path", str(checkpoint), "--trainer.logger", "false") == 0
    assert "val/loss" in capsys.readouterr().out
    assert set(workplace.rglob("*")) == before


@pytest.mark.slow
def test_prepared_sets_are_mixed_with_the_vocabulary_they_have(workplace, monkeypatch, capsys):
    every = ("--sources", "texts", "--output_dir", "all", "--tokenizer.vocab_size", "290", "--val_fraction", "0.2")
    assert run(monkeypatch, "prepare", *every) == 0
    few = ("--sources", "texts/1*.txt", "--output_dir", "few", "--tokenizer.path", "all/tokenizer.json")
    assert run(monkeypatch, "prepare", *few) == 0
    options = ("--data.mixture", "{all: {prepared: all, weight: 2}, few: {prepared: few}}")
    options += ("--data.packing", "best_fit", "--data.curriculum", "{0: 16, 2: 64}")
    assert run(monkeypatch, "fit", "--config", "small.yaml", *options, *LOGGED) == 0
    (config,) = workplace.glob("runs/**/config.yaml")
    (checkpoint,) = workplace.glob("runs/**/last.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert [len(state[name]) for name in state if "embed_tokens" in name] == [290]
    going_on = ("fit", "--config", str(config), "--ckpt_path", str(checkpoint), "--trainer.max_steps", "5")
    assert run(monkeypatch, *going_on) == 0
    assert run(monkeypatch, *going_on, "--data.mixture.all.weight", "3") == 2
    assert "data.mixture.all.weight must stay as it was to resume: the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.prepared", "nowhere"], "fit: error: data.prepared must be a set that nsa prepare has finished"),
        (["--data.mixture", "{a: {prepared: x, weigth: 2}}"], "weigth"),
        (["--model.transformer.hiden_size", "8"], "hiden_size"),
        (["--model.transformer.num_heads", "3", "--model.transformer.num_kv_heads", "2"],
         "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
        (["--model.transformer.nsa.compress_stride", "3"],
         "compress_stride must divide compress_block_size, got 3 and 8"),
        (["--data.seq_len", "7"], "nsa.compress_block_size, got 7 and 8"),
        (["--data.sources", '["nowhere/*.txt"]'], "nowhere/*.txt"),
        (["--data.sources", '["picture.bin"]'], "picture.bin"),
        (["--data.sources", '["empty.txt"]'], "data.sources"),
        (["--ckpt_path", "missing.ckpt"], "ckpt_path must be an existing checkpoint, got missing.ckpt"),
        (["--trainer.accelerator", "gpu"], "trainer.accelerator must name hardware that PyTorch can use, got gpu"),
        (["--model.schedule", "WarmupCosine", "--model.schedule.final_ratio", "2"], "final_ratio must be from 0 to 1"),
        (["--data.tokenizer.path", "missing.json"], "missing.json"),
        (["--ckpt_path", "hpc"], "ckpt_path must be the path of a checkpoint, best or last, got the word hpc"),
        (["--ckpt_path", "texts"], "ckpt_path must be a checkpoint of nsa fit, got the directory texts"),
        (["--trainer.strategy", "fsdp2", "--trainer.precision", "bf16-true"],
         "trainer.precision must be 32-true or bf16-mixed with trainer.strategy=fsdp2, got bf16-true"),
        (["--loss_guard.spike_ratio", "1"], "loss_guard.spike_ratio must be above 1, got 1.0"),
        (["--ckpt_path", "small.yaml"], "ckpt_path must be a checkpoint of nsa fit, got small.yaml: "),
        (["--trainer.max_steps", "-1", "--trainer.max_epochs", "1"], "trainer.max_steps must be at least 1, got -1"),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_ends_in_one_line_that_names_it(workplace, monkeypatch, capsys, arguments, message):
    (workplace / "picture.bin").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe")
    (workplace / "empty.txt").write_text("")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run_small(monkeypatch, "fit", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (workplace / "lightning_logs" / "version_0" / "checkpoints").exists()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_untrained_model_is_not_measured(workplace, monkeypatch, capsys, command):
    assert run_small(monkeypatch, command) == 2
    assert "ckpt_path must name the checkpoint to measure" in capsys.readouterr().err


def test_a_checkpoint_that_would_run_code_is_refused(workplace, monkeypatch, capsys):
    class Stranger:
        def __reduce__(self):
            return Path.touch, (workplace / "touched",)

    torch.save({"state_dict": Stranger(), "pytorch-lightning_version": "2"}, workplace / "stranger.ckpt")
    assert run_small(monkeypatch, "validate", "--ckpt_path", "stranger.ckpt") == 2
    assert "ckpt_path must be a checkpoint of nsa fit, got stranger.ckpt" in capsys.readouterr().err
    assert not (workplace / "touched").exists()


def test_last_is_the_last_step_although_validation_came_before(workplace, monkeypatch):
    assert run_small(monkeypatch, "fit", *LOGGED, "--trainer.max_steps", "5") == 0
    (path,) = workplace.glob("runs/**/last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 5


@pytest.mark.slow
def test_a_checkpoint_can_be_used_after_its_corpus_has_changed(workplace, monkeypatch, capsys):
    assert run_small(monkeypatch, "fit", *LOGGED) == 0
    (path,) = workplace.glob("runs/**/last.ckpt")
    (tokenizer,) = workplace.glob("runs/**/tokenizer.json")
    for index in range(8):  # some of them fall into the training split
        (workplace / "texts" / f"new_{index}.txt").write_text(f"words {index} that were not there before " * 90)
    capsys.readouterr()
    assert run_small(monkeypatch, "validate", "--ckpt_path", str(path)) == 2
    assert "set data.tokenizer.path to the tokenizer.json" in capsys.readouterr().err
    arguments = ("--ckpt_path", str(path), "--data.tokenizer.path", str(tokenizer))
    assert run_small(monkeypatch, "validate", *arguments) == 0


def test_logger_and_checkpoints_can_be_switched_off(workplace, monkeypatch):
    switches = ("--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    assert run_small(monkeypatch, "fit", *switches) == 0
    assert not list(workplace.rglob("*.ckpt"))


def test_settings_that_differ_from_the_checkpoint_are_named(workplace, monkeypatch):
    assert run_small(monkeypatch, "fit", *LOGGED) == 0
    (path,) = workplace.glob("runs/**/last.ckpt")
    with pytest.warns(UserWarning, match="nsa.window_size was 8, is 16"):
        run_small(monkeypatch, "validate", "--ckpt_path", str(path), "--model.transformer.nsa.window_size", "16")


@pytest.mark.slow
def test_two_processes_train_and_report(workplace):
    """In processes of their own, as Lightning starts them."""
    command = [sys.executable, "-m", "nsa_cli.main", "fit", "--config", "small.yaml", "--data.sources", '["texts"]']
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp", *LOGGED]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("best checkpoint") == 1
    assert list(workplace.glob("runs/**/last.ckpt"))


def test_ctrl_c_while_a_command_is_imported_ends_in_one_line(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(nsa_cli.main, "import_module", interrupted)
    assert run(monkeypatch, "generate") == 130
    assert capsys.readouterr().err == "nsa generate: error: interrupted\n"


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_told_to_stop_saves_and_does_not_look_finished(workplace, signum, status):
    command = ("small.yaml", "--data.sources", '["texts"]', *LOGGED, *TELLS_SAVES)
    run = start(*command, "--trainer.max_steps", "1000000", "--data.num_workers", "1", stderr=subprocess.DEVNULL)
    wait_until_saved(run)
    os.killpg(run.pid, signum)  # as a scheduler and a terminal do: to the process that makes batches too
    printed, _ = run.communicate(timeout=60)
    assert run.returncode == status
    (path,) = workplace.glob("runs/**/last.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] >= 3
    command, words = printed.splitlines()[-2:]
    assert command.endswith(f"--ckpt_path {path.relative_to(workplace)}")  # of the command that goes on
    assert "along the same schedule" in words


def test_a_key_that_does_not_exist_in_a_config_is_named(workplace, monkeypatch, capsys):
    (workplace / "small.yaml").write_text(SMALL.replace("window_size", "windows_size"))
    assert run_small(monkeypatch, "fit") == 2
    assert "windows_size" in capsys.readouterr().err


def test_a_checkpoint_of_another_tokenizer_is_refused(workplace, monkeypatch, capsys):
    assert run_small(monkeypatch, "fit") == 0
    (checkpoint,) = workplace.glob("lightning_logs/**/last.ckpt")
    capsys.readouterr()
    status = run_small(monkeypatch, "validate", "--ckpt_path", str(checkpoint), "--data.tokenizer.vocab_size", "310")
    assert status == 2
    error = capsys.readouterr().err
    assert "vocab" in error or "embed_tokens" in error
    assert "Traceback" not in error


def test_memory_tells_of_a_run_on_gpus_that_are_not_there_and_reads_no_data(workplace, monkeypatch, capsys):
    arguments = ["memory", "--config", "small.yaml", "--data.sources", "nowhere/*.txt", "--world_size", "4"]
    arguments += ["--model.transformer.nsa.select_block_size", "16", "--trainer.strategy", "fsdp2"]
    assert run(monkeypatch, *arguments, "--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed") == 0
    printed = capsys.readouterr().out
    assert "fsdp2 on 4 GPUs, 64 tokens a step on each" in printed
    assert "optimizer state" in printed
    written = {path.name for path in (*workplace.iterdir(), *workplace.glob("cache/*"))}
    assert written - {"cache", "matplotlib"} == {"texts", "small.yaml"}  # which lists its fonts at its first import


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gpus"), [("8b", 8), ("70b", 64), ("paper", 4)])
def test_a_recipe_fits_its_gpus_and_says_how_much_it_takes(monkeypatch, capsys, name, gpus):
    monkeypatch.setattr(simulated_gpu, "ASSUMED_CAPABILITY", (8, 0))  # Triton's interpreter cannot import Gluon
    config = CONFIGS / f"nsa_{name}.yaml"
    assert run(monkeypatch, "memory", "--config", str(config), "--world_size", str(gpus)) == 0
    needed = float(re.search(r"a GPU needs.* ([\d.]+)\n", capsys.readouterr().out)[1])
    assert needed <= 72  # of 80, for fragmentation
    assert f"{needed:.0f} GB" in " ".join(config.read_text().split("seed_everything")[0].split("\n# "))


@pytest.mark.slow
def test_memory_takes_the_way_of_the_kernels_written_for_hopper():
    """As a user starts it: not under Triton's interpreter. Head dims of 64 and 128 have kernels of their own."""
    code = "import sys; from nsa_cli.main import main\nfor sys.argv[-1] in sys.argv[-1].split(): assert main() == 0"
    configs = " ".join(f"--config={CONFIGS / f'nsa_{name}.yaml'}" for name in ("1b", "8b"))
    settings = ["--world_size", "8", "--model.transformer.num_layers", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", code, "memory", *settings, configs]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("a GPU needs") == 2


def test_an_unknown_command_lists_the_commands(monkeypatch, capsys):
    assert run(monkeypatch, "train") == 2
    assert "no command 'train'; the commands are fit, validate" in capsys.readouterr().err


def test_help_names_every_command_without_importing_torch():
    code = "import sys; sys.argv = ['nsa', '--help']; from nsa_cli.main import main; main()"
    code += "; assert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for command in ("fit", "validate", "test", "predict", "prepare", "bench"):
        assert f"  {command}" in result.stdout


def test_the_help_of_fit_explains_every_setting_of_ours(monkeypatch, capsys):
    assert run(monkeypatch, "fit", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag, words in {
        "--model.transformer.nsa.num_selected_blocks": "Blocks that a query attends to",
        "--model.transformer.nsa.kv_sharing": "One pair of key and value projections",
        "--model.transformer.rope.scaling": "divides every frequency by the factor",
        "--model.transformer.attention": "Attention by layer",
        "--model.compile": "torch.compile",
        "--data.seq_len": "tokens in a sequence",
        "--data.tokenizer.vocab_size": "",
        "--gate_monitor.every_n_steps": "optimizer steps between two logs",
    }.items():
        assert flag in text
        assert words in text


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_is_accepted(config, monkeypatch, capsys):
    assert run(monkeypatch, "fit", "--config", str(config), "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(config.read_text())
    assert printed["data"]["seq_len"] == written["data"]["seq_len"]
    assert printed["model"]["transformer"]["hidden_size"] == written["model"]["transformer"]["hidden_size"]


@pytest.mark.slow
def test_arms_of_the_study_differ_in_their_attention_alone(monkeypatch, capsys):
    base, *arms = (
        CONFIGS / "study" / f"{name}.yaml" for name in ("base", "full", "nsa", "nsa_paper", "third_dense", "sliding")
    )
    assert {base, *arms, CONFIGS / "study" / "cpu.yaml"} == set((CONFIGS / "study").glob("*.yaml"))
    rest, attention = [], []
    for arm in arms:
        assert run(monkeypatch, "fit", "--config", str(base), "--config", str(arm), "--print_config") == 0
        settings = yaml.safe_load(capsys.readouterr().out)
        transformer = settings["model"]["transformer"]
        attention.append([transformer.pop(name) for name in ("attention", "nsa", "sliding_window")])
        assert settings["trainer"]["logger"]["init_args"].pop("name") == arm.stem
        rest.append(settings)
    assert all(settings == rest[0] for settings in rest)
    assert all(one not in attention[:index] for index, one in enumerate(attention))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "billions"), [("150m", 0.15), ("1b", 1.3), ("8b", 8.3), ("70b", 71.4), ("paper", 4.0)]
)
def test_recipes_have_the_parameters_that_they_say(name, billions, monkeypatch, capsys):
    """1b, 8b and 70b as Llama's with the parts that NSA adds: gates and block summaries."""
    assert run(monkeypatch, "fit", "--config", str(CONFIGS / f"nsa_{name}.yaml"), "--print_config") == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    vocabulary = {"vocab_size": settings["data"]["tokenizer"]["vocab_size"]}
    with torch.device("meta"):
        model = Transformer(TransformerConfig.from_dict(settings["model"]["transformer"] | vocabulary))
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.04)


@pytest.mark.slow
def test_printing_a_config_imports_nothing_that_only_a_run_needs():
    """What else keeps a user waiting: the libraries of data, logs and kernels take seconds."""
    code = "import sys; from nsa_cli.main import main\ntry: main()\nexcept SystemExit: print(*sys.modules)"
    command = [sys.executable, "-c", code, "fit", "--print_config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    config, _, modules = printed.rstrip("\n").rpartition("\n")
    assert yaml.safe_load(config)["data"]["sources"] == []
    needed = {"lightning.pytorch", "nsa_lightning.data.datamodule"}
    of_a_run = {
        "pyarrow",
        "tensorboard",
        "torch.utils.tensorboard",
        "nsa_kernels.triton.attention",
        "nsa_lightning.memory",
    }
    assert set(modules.split()) & (needed | of_a_run) == needed
