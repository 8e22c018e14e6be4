"""A converted model is trained on from its config, and what was trained is exported; dense weights survive the way."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from support.command_line import run as run_command
from support.dense import SOURCES, write_source
from support.training import NSA, fit, language_model, run_job, write_corpus

from nsa_lightning.checkpoint.convert import RopeChange, convert
from nsa_lightning.checkpoint.export import export
from nsa_lightning.checkpoint.weights import WeightFiles
from nsa_lightning.training.module import LanguageModel

MEAN = replace(NSA, compression="mean", kv_sharing="shared")


def run(monkeypatch, *words):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    return run_command(monkeypatch, *words)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A source with a tokenizer smaller than its embedding, what it is converted to, and a corpus."""
    root = tmp_path_factory.mktemp("export")
    source = write_source(root / "source", "llama_tied", tokenizer=True, dtype=torch.bfloat16)
    convert(source, root / "made", ["nsa", "full"], MEAN, RopeChange(), 128, None, 0)
    (root / "corpus").mkdir()
    write_corpus(root / "corpus")
    return root


@pytest.fixture(scope="module")
def trained(workplace):
    """The run directory of `nsa fit --config continue.yaml`, in float32 and for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        patch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
        words = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2"]
        words += ["--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "1", "--data.num_workers", "0"]
        words += ["--data.sources", f"[{workplace / 'corpus'}]", "--data.val_fraction", "0.2"]
        assert run(patch, "fit", "--config", workplace / "made" / "continue.yaml", *words) == 0
    return workplace / "runs" / "made" / "version_0"


def all_tensors(path):
    files = WeightFiles(path, "test")
    return {name: files.read(name) for name in files.shapes}


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_model_comes_back_bit_by_bit(tmp_path, name, dtype):
    source = write_source(tmp_path / "source", name, dtype=dtype)
    kind = ["sliding"] if name in ("mistral_sliding", "mistral_default") else ["full"]
    convert(source, tmp_path / "made", kind, NSA, RopeChange(), 64, None, 0)
    export(tmp_path / "made", tmp_path / "back", None, None)
    assert_identical(all_tensors(tmp_path / "back"), all_tensors(source))


def test_training_starts_from_the_converted_weights_and_keeps_the_embedding(workplace, trained):
    checkpoint = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)
    made = all_tensors(workplace / "made")
    assert checkpoint["state_dict"]["model.embed_tokens.weight"].shape == (300, 32)  # the tokenizer has fewer
    distances = [(checkpoint["state_dict"][name] - tensor.float()).abs().max() for name, tensor in made.items()]
    assert max(distances) < 1e-3
    assert max(distances) > 0
    assert yaml.safe_load((trained / "config.yaml").read_text())["model"]["init_from"] == str(workplace / "made")


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_what_training_starts_from_is_measured_and_a_dense_source_trains_on_alike(workplace, monkeypatch, attention):
    """The converted model differs from its source by what its other gates let through."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    words = [
        "--config",
        workplace / "made" / "continue.yaml",
        "--trainer.accelerator",
        "cpu",
        "--data.num_workers",
        "0",
    ]
    words += [
        "--trainer.precision",
        "32-true",
        "--data.sources",
        f"[{workplace / 'corpus'}]",
        "--data.val_fraction",
        "0.2",
    ]
    if attention == "full":
        words += ["--model.init_from", workplace / "source", "--model.transformer.attention", "[full]"]
    measured = []
    monkeypatch.setattr(Trainer, "validate", logged(Trainer.validate, measured))
    assert run(monkeypatch, "validate", *words) == 0
    assert measured[0]["val/loss_by_position/0"] == pytest.approx(measured[0]["val/loss"])
    learns = ["--model.distillation.teacher", workplace / "source", "--trainer.max_steps", "1"]
    assert run(monkeypatch, "fit", *words, *learns, "--trainer.val_check_interval", "1") == 0


def logged(function, results):
    """The function, which notes what it returns."""

    def call(*args, **kwargs):
        results.extend(function(*args, **kwargs))
        return results

    return call


def test_a_run_from_converted_weights_goes_on_from_its_checkpoint(tmp_path, trained, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--ckpt_path", trained / "checkpoints" / "last.ckpt", "--trainer.max_steps", "3"]
    assert run(monkeypatch, "fit", "--config", trained / "config.yaml", *words) == 0
    (last,) = tmp_path.glob("runs/**/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 3


def test_a_trained_checkpoint_is_exported_with_its_tokenizer(tmp_path, trained, monkeypatch, capsys):
    path, output = trained / "checkpoints" / "last.ckpt", tmp_path / "out"
    assert run(monkeypatch, "export", "--checkpoint", path, "--output", output) == 0
    assert "nsa_lightning, 0.0 M weights in float32" in capsys.readouterr().out
    state = torch.load(path, weights_only=True)["state_dict"]
    tensors = all_tensors(output)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, state[name])
    assert len(tensors) == len(state) - 1  # tied
    assert (output / "tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()
    assert run(monkeypatch, "export", "--checkpoint", path, "--output", tmp_path / "half", "--dtype", "bfloat16") == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(tensor.dtype == torch.bfloat16 for tensor in all_tensors(tmp_path / "half").values())


@pytest.mark.slow
def test_two_ranks_start_from_the_converted_weights_and_their_shards_are_exported(tmp_path, workplace):
    """The first loss is that of one process with the same sequences."""
    sizes = {"num_key_value_heads": 1, "tie_word_embeddings": True}
    convert(write_source(tmp_path / "dense", **sizes), tmp_path / "nsa", ["nsa"], NSA, RopeChange(), 128, None, 0)
    settings = {"root": str(tmp_path), "corpus": str(workplace / "corpus"), "max_steps": 1}
    settings["model"] = {"init_from": str(tmp_path / "nsa")}
    sharded = {"strategy": "fsdp2", "data": {"batch_size": 1}, "save_after": 1, "save": str(tmp_path / "two.ckpt")}
    (two,) = run_job(tmp_path, settings | sharded)
    one = fit(Path(settings.pop("root")), Path(settings.pop("corpus")), **settings)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    export(tmp_path / "two.ckpt", tmp_path / "out", None, None)
    exported = all_tensors(tmp_path / "out")
    assert len(exported) == len(two["weights"]) - 1  # tied
    assert_identical(exported, {f"model.{name}": w for name, w in two["weights"].items() if name != "lm_head.weight"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "nowhere"], "checkpoint must be a checkpoint of nsa fit or a directory of nsa convert"),
        (["--checkpoint", "corpus"], "got the directory corpus, which has neither config.json nor a whole checkpoint"),
        (["--checkpoint", "corpus/file_0.py"], "checkpoint must be a checkpoint of nsa fit, got corpus/file_0.py"),
        (["--checkpoint", "made", "--tokenizer", "nowhere"], "tokenizer must be a directory or a tokenizer.json"),
        (["--checkpoint", "made", "--output", "corpus"], "output must not exist, got corpus"),
    ],
)
def test_what_cannot_be_exported_is_named(workplace, monkeypatch, capsys, words, message):
    monkeypatch.chdir(workplace)
    assert run(monkeypatch, "export", *(["--output", "new"] if "--output" not in words else []), *words) == 2
    assert message in capsys.readouterr().err
    assert not (workplace / "new").exists()


def test_another_model_than_the_converted_one_is_not_started(workplace):
    config = language_model().transformer_config
    with pytest.raises(ValueError, match=r"data.tokenizer must have at most the 300 tokens of the model"):
        LanguageModel(replace(config, vocab_size=301), init_from=str(workplace / "made"))
    with pytest.warns(UserWarning, match="attention was .*, is .*"):
        model = LanguageModel(config, init_from=str(workplace / "made"))
    with pytest.raises(ValueError, match=r"model.init_from=.* does not fit its config: it lacks model.layers"):
        model.configure_model()
    with pytest.raises(ValueError, match=r"model.init_from must be a directory with a readable config.json"):
        LanguageModel(config, init_from=str(workplace / "corpus"))
