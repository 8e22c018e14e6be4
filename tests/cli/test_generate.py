"""`nsa generate` as a user types it, on tiny models from every kind of source."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import write_checkpoints
from support.command_line import run as run_command
from support.dense import rewrite, write_source
from support.training import NSA

from nsa_lightning.checkpoint.consolidate import consolidate
from nsa_lightning.checkpoint.convert import RopeChange, convert
from nsa_lightning.checkpoint.export import export
from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.generation.decoder import Decoder

GREEDY = ("--temperature", "0", "--max_new_tokens", "12")
LAST = "run/checkpoints/last.ckpt"
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}"


def run(monkeypatch, *words):
    """Exit status of `nsa generate *words`."""
    return run_command(monkeypatch, "generate", *words)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A dense source, an NSA model made of it, and both as everything that writes models writes them."""
    root = tmp_path_factory.mktemp("models")
    dense = write_source(root / "dense", "llama_tied", tokenizer=True, eos_token_id=299)
    (dense / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT, "bos_token": {"content": "<|b|>"}}))
    convert(dense, root / "made", ["nsa"], NSA, RopeChange(), 64, None, 0)
    convert(dense, root / "full", ["full"], NSA, RopeChange(), 64, None, 0)
    export(root / "full", root / "dense_again", None, None)
    write_checkpoints(root / "made", root / "run")
    export(root / "run" / "checkpoints" / "last.ckpt", root / "exported", None, None)
    return root


@pytest.mark.parametrize(
    "same",
    [["dense", "dense_again", "full"], ["made", "exported", LAST, "run/checkpoints/sharded.ckpt"]],
    ids=["dense", "nsa"],
)
def test_every_kind_of_source_gives_the_same_text(models, monkeypatch, capsys, same):
    texts = []
    for name in same:
        assert run(monkeypatch, "--model", models / name, "--prompt", "some text of a few words", *GREEDY) == 0
        printed = capsys.readouterr()
        texts.append(printed.out)
        assert "prefill" in printed.err
    assert len(set(texts)) == 1
    assert len(texts[0]) > 5


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "runs/name", "runs/name/version_1"])
def test_of_a_run_the_last_whole_checkpoint_is_taken(models, tmp_path, monkeypatch, capsys, place):
    monkeypatch.chdir(tmp_path)
    for version in ("runs/name/version_0", "runs/name/version_1", "run"):
        shutil.copytree(models / "run", version)
        Path(version, "checkpoints", "broken.ckpt").write_bytes(
            Path(version, "checkpoints", "last.ckpt").read_bytes()[:9]
        )
    words = ("--prompt", "some text of a few words", *GREEDY)
    assert run(monkeypatch, "--model", models / "made", *words) == 0
    expected = capsys.readouterr().out
    assert run(monkeypatch, "--model", place, *words) == 0
    printed = capsys.readouterr()
    assert printed.out == expected
    assert f"nsa generate: note: model is {place}/" in printed.err
    assert run(monkeypatch, "--model", "runs", *words) == 2
    assert "got the directory runs, which has neither config.json nor a whole checkpoint" in capsys.readouterr().err


def test_a_consolidated_checkpoint_has_its_tokenizer_and_config_wherever_it_is(models, tmp_path, monkeypatch, capsys):
    shutil.copytree(models / "run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("seed_everything: 0\n")
    (tmp_path / "run" / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>", "chat_template": "x"})
    )
    consolidate(tmp_path / "run" / "checkpoints" / "sharded.ckpt", tmp_path / "one.ckpt")
    capsys.readouterr()
    shutil.rmtree(tmp_path / "run")
    words = ("--prompt", "some text of a few words", *GREEDY)
    assert run(monkeypatch, "--model", models / "made", *words) == 0
    expected = capsys.readouterr().out
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "one.ckpt").rename(tmp_path / "elsewhere" / "one.ckpt")
    assert run(monkeypatch, "--model", tmp_path / "elsewhere" / "one.ckpt", *words) == 0
    assert capsys.readouterr().out == expected
    assert run(monkeypatch, "--model", tmp_path / "elsewhere" / "one.ckpt", *words, "--chat") == 0
    exported = export(tmp_path / "elsewhere" / "one.ckpt", tmp_path / "exported", None, None)
    assert exported.tokenizer_files == ["tokenizer.json", "tokenizer_config.json"]
    kept = torch.load(tmp_path / "elsewhere" / "one.ckpt", weights_only=True)["run_files"]
    assert kept["config.yaml"] == "seed_everything: 0\n"


def test_answers_stand_in_the_order_of_their_prompts_on_paper_and_in_a_file(models, tmp_path, monkeypatch, capsys):
    prompts = ["some text", "a few words of some text", "w", "few"]
    (tmp_path / "a.txt").write_text(prompts[0] + "\n")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in prompts[1:]) + "\n\n")
    words = ["--model", models / "made", "--prompt_file", tmp_path / "a.txt", tmp_path / "b.jsonl", "--batch_size", "2"]
    words += ["--seed", "3", "--max_new_tokens", "9"]
    assert run(monkeypatch, *words, "--output", tmp_path / "out.jsonl") == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert run(monkeypatch, *words) == 0
    names = [str(tmp_path / "a.txt"), *(f"{tmp_path / 'b.jsonl'}:{number}" for number in (1, 2, 3))]
    expected = [f"==> {name} <==\n{line['answer']}\n" for name, line in zip(names, lines, strict=True)]
    assert capsys.readouterr().out == "".join(expected)
    assert run(monkeypatch, *words, "--output", tmp_path / "out.jsonl") == 2
    assert "output must not exist" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.jsonl", "out.jsonl"}


def test_a_chat_is_rendered_by_the_template_in_a_sandbox(models, tmp_path, monkeypatch, capsys):
    words = ("--model", models / "dense", *GREEDY)
    encoded = []
    monkeypatch.setattr(Tokenizer, "encode_prompt", recorded(Tokenizer.encode_prompt, encoded))
    assert run(monkeypatch, *words, "--chat", "true", "--prompt", " some text ") == 0
    assert encoded == [("<|b|>[user]some text", {"start": False})]  # the template's own start alone
    capsys.readouterr()
    assert run(monkeypatch, "--model", models / LAST, "--chat", "true", "--prompt", "x") == 2
    assert "chat must be false where the tokenizer has no chat template" in capsys.readouterr().err
    for template, message in {
        "{{ messages.append(1) }}": "failed",
        "{{ ''.__class__.__mro__ }}": "failed",
        "{% if %}": "is broken",
        "{{ raise_exception('no users') }}": "no users",
    }.items():
        (tmp_path / "chat_template.jinja").write_text(template)
        (tmp_path / "tokenizer.json").write_bytes((models / "dense" / "tokenizer.json").read_bytes())
        assert run(monkeypatch, *words, "--tokenizer", tmp_path, "--chat", "true", "--prompt", "x") == 2
        assert message in capsys.readouterr().err


def recorded(method, calls):
    """The method, and a note of every call."""

    def call(self, text, **options):
        calls.append((text, options))
        return method(self, text, **options)

    return call


def test_an_answer_ends_at_any_token_that_the_settings_name(models, tmp_path, monkeypatch, capsys):
    words = ("--model", models / "made", "--prompt", "some text", *GREEDY, "--output")
    assert run(monkeypatch, *words, tmp_path / "whole.jsonl") == 0
    whole = json.loads((tmp_path / "whole.jsonl").read_text())
    assert (whole["finish"], whole["tokens"]) == ("length", 12)
    every = json.dumps({"eos_token_id": list(range(300))})
    (models / "made" / "generation_config.json").write_text(every)
    assert run(monkeypatch, *words, tmp_path / "ended.jsonl") == 0
    (models / "made" / "generation_config.json").unlink()
    assert json.loads((tmp_path / "ended.jsonl").read_text()) == whole | {"answer": "", "tokens": 0, "finish": "end"}


def test_a_context_that_is_exceeded_is_told_with_the_scaling_that_reaches_so_far(models, monkeypatch, capsys):
    words = ["--model", models / "dense", "--prompt", "w" * 300, *GREEDY]
    assert run(monkeypatch, *words) == 0
    error = capsys.readouterr().err
    assert "exceed the context of 256 tokens that the model is made for; --rope.scaling yarn --rope.factor 2" in error
    assert run(monkeypatch, *words, "--rope.scaling", "yarn", "--rope.factor", "2") == 0
    assert "context" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "a prompt must not be empty, got an empty one from prompt"),
        (["--prompt", "x", "--prompt_file", "y"], "prompt and prompt_file must not both be given"),
        (["--prompt_file", "nowhere"], "prompt_file must be a readable file, got nowhere"),
        (["--prompt_file", "broken.jsonl"], "prompt_file: broken.jsonl:2 must be an object with a text as \"prompt\""),
        (["--prompt_file", "latin"], "a prompt must be UTF-8 text, latin is not"),
        (["--prompt_file", "empty.jsonl"], "prompt_file must hold prompts, empty.jsonl has none"),
        ([], "prompt or prompt_file must be given where nothing is piped in, got neither"),
        (["--prompt", "x", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "x", "--max_new_tokens", "1000000000000"], "of cpu: a cache of 1 x 1000000000002 tokens takes"),
        (["--prompt", "x", "--temperature", "-1"], "temperature must be at least 0 and finite, got -1.0"),
        (["--prompt", "x", "--device", "cuda:7"], "device must be one that PyTorch can use, got cuda:7"),
        (["--prompt", "x", "--tokenizer", "nowhere"], "tokenizer must be a tokenizer.json or its directory, got"),
        (["--prompt", "x", "--rope.scaling", "yarn"], "rope.factor must be set with rope.scaling=yarn, got none"),
        (["--prompt", "x", "--output", "nowhere/out.jsonl"], "nowhere/out.jsonl"),
        (["--prompt", "x", "--model", "latin"], "model must be a checkpoint of nsa fit, got latin"),
        (["--prompt", "x", "--model", "gone"], "model must be a checkpoint of nsa fit or a directory of nsa convert"),
        (["--prompt", "x", "--model", "untold.ckpt"], "tokenizer must be given where the run of the checkpoint has no"),
        (["--prompt", "x", "--dtype", "int8"], "int8"),
        (["--prompt", "x", "--top_q", "1"], "top_q"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_ends_in_one_line_that_names_it(models, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "untold.ckpt").write_bytes((models / LAST).read_bytes())
    monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO()))
    before = sorted(tmp_path.iterdir())
    model = [] if "--model" in words else ["--model", models / "made"]
    assert run(monkeypatch, *model, *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


class Terminal(io.TextIOWrapper):
    """A standard input that nothing is piped into."""

    def __init__(self, buffer):
        super().__init__(buffer)
        buffer.isatty = lambda: True


def test_weights_that_are_no_numbers_are_told(models, tmp_path, monkeypatch, capsys):
    dense = write_source(tmp_path / "nan", "llama_tied", tokenizer=True)
    rewrite(dense, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))
    assert run(monkeypatch, "--model", dense, "--prompt", "x") == 2
    assert "model must give finite logits" in capsys.readouterr().err


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_it_without_a_word(models):
    command = [sys.executable, "-m", "nsa_cli.main", "generate", "--model", models / "made", "--prompt", "some text"]
    process = subprocess.Popen(
        [*command, "--max_new_tokens", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(3)
    process.stdout.close()
    told = process.stderr.read().splitlines()
    assert process.wait(timeout=60) == 141
    assert [line.split()[0] for line in told] == ["nsa", "prefill"]  # the context's note, and the speed


def test_ctrl_c_prints_what_there_is(models, monkeypatch, capsys):
    words = ("--model", models / "made", "--prompt", "some text", *GREEDY)
    assert run(monkeypatch, *words) == 0
    whole = capsys.readouterr().out
    monkeypatch.setattr(Decoder, "step", interrupted_at(7, Decoder.step))
    assert run(monkeypatch, *words) == 130
    printed = capsys.readouterr()
    assert len(printed.out) > 2
    assert whole.startswith(printed.out.removesuffix("\n"))
    assert "decode 7 tokens, " in printed.err
    assert printed.err.endswith("nsa generate: error: interrupted\n")


def interrupted_at(count, step):
    """The method until it was called so often."""
    calls = iter(range(count))

    def call(*arguments):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return step(*arguments)

    return call
