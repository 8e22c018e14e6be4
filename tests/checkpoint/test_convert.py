"""`nsa convert`: what is copied, what starts anew, and every mistake named before anything is written."""

import errno
import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.command_line import run
from support.dense import rewrite, write_source

from nsa_lightning.checkpoint import directory, weights
from nsa_lightning.checkpoint.atomic import save_file
from nsa_lightning.checkpoint.convert import RopeChange, convert
from nsa_lightning.checkpoint.directory import read_config
from nsa_lightning.checkpoint.export import export
from nsa_lightning.checkpoint.weights import WeightFiles
from nsa_lightning.model.config import NSALayerConfig, TransformerConfig
from nsa_lightning.model.rope import RopeConfig
from nsa_lightning.training.module import LanguageModel

NSA = NSALayerConfig(
    kv_sharing="separate",
    branch_start="independent",
    compress_block_size=4,
    compress_stride=2,
    select_block_size=8,
    num_selected_blocks=4,
    window_size=6,
)
GEOMETRY = ("compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "window_size")
FLAGS = [f"--nsa.{name}={getattr(NSA, name)}" for name in GEOMETRY]


def refused(monkeypatch, capsys, source, *words):
    """The message of a conversion that fails and leaves nothing behind."""
    before = sorted(source.parent.iterdir())
    assert run(monkeypatch, "convert", "--source", source, "--output", source.parent / "out", *words) == 2
    assert sorted(source.parent.iterdir()) == before
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_copied_bit_by_bit_to_every_branch_and_nothing_else_is_known(tmp_path, dtype):
    source = write_source(tmp_path / "source", "qwen3", dtype=dtype, shard_bytes=9000)
    result = convert(source, tmp_path / "out", ["nsa", "full"], NSA, RopeChange(), 64, None, 0)
    old, new = WeightFiles(source, "source"), WeightFiles(tmp_path / "out", "out")
    assert len(old.files) > 2
    assert len(new.files) > 2
    for name in old.shapes:
        assert torch.equal(new.read(name), old.read(name))
        assert new.dtype(name) == dtype
    branch = "model.layers.0.self_attn."
    for name in ("k_proj.weight", "v_proj.weight", "k_norm.weight"):
        for copy in ("compressed", "sliding"):
            assert torch.equal(new.read(f"{branch}{copy}.{name}"), old.read(branch + name))
    gates = new.read(f"{branch}branch_gate.bias").unflatten(0, (-1, 3))
    assert torch.equal(gates, torch.tensor([[-4.0, 4.0, -4.0]] * 4, dtype=dtype))
    assert not new.read(f"{branch}branch_gate.weight").any()
    assert not new.read(f"{branch}k_summary.out_weight").any()
    assert new.read(f"{branch}k_summary.in_weight").any()
    assert not any("layers.1" in name and name not in old.shapes for name in new.shapes)
    total = sum(torch.Size(shape).numel() for shape in new.shapes.values())
    assert result.copied + result.repeated + result.new == total
    assert result.copied == sum(torch.Size(shape).numel() for shape in old.shapes.values())


def test_with_the_other_gates_shut_the_start_is_the_source_up_to_what_a_query_selects(tmp_path):
    source, text = write_source(tmp_path / "source", tokenizer=True), tmp_path / "text.txt"
    text.write_text("some words of text\n" * 300)
    nsa = replace(NSA, compress_block_size=8, compress_stride=8, select_block_size=64)  # reads 256 tokens
    alone, mixed = (
        convert(source, tmp_path / f"{bias}", ["nsa"], nsa, RopeChange(), 64, text, 300, bias).difference.by_position
        for bias in (40.0, 4.0)
    )
    assert alone["0"]["converted"] == pytest.approx(alone["0"]["source"], rel=1e-6)
    assert alone["256"]["converted"] != pytest.approx(alone["256"]["source"], rel=1e-6)
    assert mixed["0"]["converted"] != pytest.approx(mixed["0"]["source"], rel=1e-6)


def test_what_a_new_rotary_embedding_alone_does_to_the_source_is_told(tmp_path):
    source, text = write_source(tmp_path / "source", tokenizer=True), tmp_path / "text.txt"
    text.write_text("some words of text\n" * 60)
    change = RopeChange(scaling="linear", factor=8.0)
    losses = convert(source, tmp_path / "out", ["full"], NSA, change, 64, text, 100, 4.0).difference.losses
    assert losses["converted"] == pytest.approx(losses["source with this rope"], rel=1e-6)
    assert losses["converted"] != pytest.approx(losses["source"], rel=1e-6)


def test_memory_is_held_for_one_shard(tmp_path, monkeypatch):
    """Counted in what is read before the next file is written; the largest tensor is the embedding."""
    source = write_source(tmp_path / "source", shard_bytes=40_000)
    limit, held, most = WeightFiles(source, "source").largest_file, 0, 0
    read, save = WeightFiles.read, weights.save_file

    def counted_read(self, name):
        nonlocal held, most
        tensor = read(self, name)
        held, most = held + tensor.nbytes, max(most, held + tensor.nbytes)
        return tensor

    def counted_save(*args, **kwargs):
        nonlocal held
        held = 0
        save(*args, **kwargs)

    monkeypatch.setattr(WeightFiles, "read", counted_read)
    monkeypatch.setattr(weights, "save_file", counted_save)
    convert(source, tmp_path / "out", ["nsa"], NSA, RopeChange(), 64, None, 0)
    assert 0 < most < 1.3 * limit


def test_the_command_says_what_it_made_and_measures_it(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "source", tokenizer=True)
    (tmp_path / "text.txt").write_text("some words of text\n" * 300)
    words = ["--sample", tmp_path / "text.txt", "--sample_tokens", 300, "--nsa.compression", "mean", *FLAGS]
    words += ["--rope.scaling", "yarn", "--rope.factor", "2", "--attention", "[nsa, full]"]
    assert run(monkeypatch, "convert", "--source", source, "--output", tmp_path / "out", *words) == 0
    printed = capsys.readouterr().out
    assert "layers       1 full, 1 nsa" in printed
    assert "nats a token on 300 tokens" in printed
    means = [
        [float(number) for number in re.findall(r"\d\.\d{4}", line)]
        for line in printed.splitlines()
        if line.startswith(("loss", "  from"))
    ]
    for whole, early, late in zip(*means, strict=True):  # 299 predictions, 256 of them in the first bucket
        assert whole == pytest.approx((256 * early + 43 * late) / 299, abs=2e-4)
    assert "note         seq_len 16384 is beyond the context of 512 tokens" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"config.json", "tokenizer.json", "continue.yaml"}
    saved = read_config(tmp_path / "out", "out")
    assert saved.max_seq_len == 512
    assert saved.config.rope == RopeConfig(scaling="yarn", factor=2.0, original_max_seq_len=256)
    assert saved.config.nsa.window_size == NSA.window_size
    assert yaml.safe_load((tmp_path / "out" / "continue.yaml").read_text())["data"]["seq_len"] == 16384
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 2


def test_a_tied_output_layer_that_is_written_out_and_derived_tables_are_left_out(tmp_path):
    source = write_source(tmp_path / "source", "llama_tied")
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    head = WeightFiles(source, "source").read("model.embed_tokens.weight")
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": head, table: torch.ones(6)}))
    result = convert(source, tmp_path / "out", ["full"], NSA, RopeChange(), 64, None, 0)
    assert not {"lm_head.weight", table} & WeightFiles(tmp_path / "out", "out").shapes.keys()
    assert result.config.tie_embeddings
    assert not any("lm_head" in remark for remark in result.remarks)


def test_an_output_layer_that_is_not_the_embedding_it_is_said_to_be_is_kept_with_a_word(tmp_path):
    source = write_source(tmp_path / "source", "llama_tied")
    rewrite(source, lambda tensors: tensors.update({"lm_head.weight": torch.ones(300, 32)}))
    for attention in (["full"], ["nsa"]):
        output = tmp_path / attention[0]
        result = convert(source, output, attention, NSA, RopeChange(), 64, None, 0)
        assert "ties the output layer to the embedding, lm_head.weight in its files is another" in result.remarks[0]
        assert torch.equal(WeightFiles(output, "out").read("lm_head.weight"), torch.ones(300, 32))
        assert not read_config(output, "out").config.tie_embeddings
    export(source, tmp_path / "again", None, None)
    assert torch.equal(WeightFiles(tmp_path / "again", "out").read("lm_head.weight"), torch.ones(300, 32))


@pytest.mark.parametrize("command", ["convert", "export"])
@pytest.mark.parametrize("sample_tokens", ["100", "0"])
def test_a_tokenizer_of_more_tokens_than_the_model_is_refused(tmp_path, monkeypatch, capsys, command, sample_tokens):
    source = write_source(tmp_path / "source", vocab_size=260, tokenizer=True)
    words = ["--source", source, "--sample_tokens", sample_tokens, "--seq_len", "64"]
    words = words if command == "convert" else ["--checkpoint", source]
    assert run(monkeypatch, command, *words, "--output", tmp_path / "out") == 2
    assert "tokenizer must have at most the 260 tokens of the model, got 270 in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_the_context_of_the_source_is_that_of_what_is_made_of_it_trained_and_exported(tmp_path, attention):
    """Llama 3.1 reaches 16 times its original context with a factor of 8."""
    source = write_source(tmp_path / "source", "llama_llama3", max_position_embeddings=1024)
    convert(source, tmp_path / "made", [attention], NSA, RopeChange(), 64, None, 0)
    settings = yaml.safe_load((tmp_path / "made" / "continue.yaml").read_text())["model"]["transformer"]
    assert settings["context_length"] == 1024
    del settings["context_length"]  # a config written by hand has none
    model = LanguageModel(TransformerConfig.from_dict(settings | {"vocab_size": 300}), init_from=str(tmp_path / "made"))
    model.configure_model()
    state = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2"}
    save_file(state | {"hyper_parameters": dict(model.hparams)}, tmp_path / "last.ckpt")
    export(tmp_path / "last.ckpt", tmp_path / "exported", None, None)
    lengths = [
        json.loads((tmp_path / name / "config.json").read_text())["max_position_embeddings"]
        for name in ("source", "made", "exported")
    ]
    assert lengths == [1024] * 3


@pytest.mark.parametrize("attention", ["nsa", "full"])
@pytest.mark.parametrize(
    "rope", [RopeChange(), RopeChange(scaling="linear", factor=2.0), RopeChange(scaling="yarn", factor=2.0)]
)
def test_training_on_as_converted_warns_of_no_difference(tmp_path, attention, rope):
    source = write_source(tmp_path / "source", "qwen2")
    convert(source, tmp_path / "made", [attention], NSA, rope, 64, None, 0)
    settings = yaml.safe_load((tmp_path / "made" / "continue.yaml").read_text())["model"]["transformer"]
    config = TransformerConfig.from_dict(settings | {"vocab_size": 300})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LanguageModel(config, init_from=str(tmp_path / "made"))
    with pytest.warns(UserWarning, match=r"rope.theta was 1000000.0, is 3.0$"):
        LanguageModel(replace(config, rope=replace(config.rope, theta=3.0)), init_from=str(tmp_path / "made"))


@pytest.mark.parametrize(
    ("settings", "words", "message"),
    [
        ({"model_type": "mamba"}, [], "model_type must be one of llama, mistral, qwen2, qwen3, got mamba"),
        ({"attention_bias": True}, [], "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, [], "hidden_act must be silu, got gelu"),
        ({"hidden_size": None}, [], "hidden_size must be given as whole numbers"),
        ({"num_key_value_heads": 3}, [], "num_heads must be a multiple of num_kv_heads, got 4 and 3"),
        ({"head_dim": 7}, [], "head_dim must be even for rotary embedding, got 7"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, [], "RoPE scaling must be one of default, linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 2.0}}, [], "mscale=2.0 of RoPE scaling yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, [], "RoPE scaling linear must give its factor"),
        ({"intermediate_size": 50}, [], "down_proj.weight is (32, 48), must be (32, 50)"),
        ({"rope_theta": "large"}, [], "rope.theta must be a finite number, got 'large'"),
        ({"num_hidden_layers": 1}, [], "has left over model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, [], "lacks model.layers.2.input_layernorm.weight"),
        ({"tie_word_embeddings": True}, ["--nsa.compress_stride", "5"], "compress_stride must divide"),
        ({}, ["--attention", "[nsa, full, full]"], "attention must have a length that divides num_layers"),
        ({}, ["--attention", "[sliding]"], "where the source has no sliding_window, got sliding"),
        ({}, ["--rope.scaling", "yarn"], "rope.factor must be set with rope.scaling=yarn, got none"),
        ({}, ["--gate_bias", "-1"], "gate_bias must be at least 0 and finite, got -1.0"),
        ({}, ["--gate_bias", ".nan"], "gate_bias must be at least 0 and finite, got nan"),
        ({}, ["--rope.factor", "2"], "rope.factor must be 1 with rope.scaling=none, got 2.0"),
        ({}, ["--seq_len", "8"], "max_seq_len (data.seq_len) must be at least nsa.compress_block_size, got 8"),
    ],
)
def test_a_source_or_setting_that_cannot_be_is_named(tmp_path, monkeypatch, capsys, settings, words, message):
    source = write_source(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | settings))
    assert message in refused(monkeypatch, capsys, source, *words)


def test_damaged_files_are_named(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "source", shard_bytes=40_000)
    second = sorted(source.glob("*.safetensors"))[1]
    whole = second.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        second.write_bytes(whole[:length])
        error = refused(monkeypatch, capsys, source)
        assert f"source: {second} is no whole safetensors file" in error
    second.unlink()
    assert f"source: {second} is no whole safetensors file" in refused(monkeypatch, capsys, source)
    (source / weights.INDEX).write_text("{")
    assert "is no index of safetensors files" in refused(monkeypatch, capsys, source)
    (source / weights.INDEX).unlink()
    assert "source must be a directory with model.safetensors" in refused(monkeypatch, capsys, source)
    (source / "config.json").write_text("[]")
    assert "config.json must hold an object, got list" in refused(monkeypatch, capsys, source)
    (source / "config.json").unlink()
    assert "source must be a directory with a readable config.json" in refused(monkeypatch, capsys, source)


def test_tensors_of_another_dtype_are_refused(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "source")
    rewrite(source, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    assert "must be one of F32, F16, BF16, got I8 for model.norm.weight" in refused(monkeypatch, capsys, source)


def test_an_output_that_exists_is_left_alone(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "source")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "output must not exist, got" in refused(monkeypatch, capsys, source)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "source")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    assert "cannot be written: [Errno 28] No space left on device" in refused(monkeypatch, capsys, source)


def test_of_two_processes_that_write_the_same_output_one_wins_and_one_is_told(tmp_path):
    output = tmp_path / "out"

    def late_one():
        with directory.new_directory(output) as late:
            (late / "config.json").write_text("late")
            with directory.new_directory(output) as early:
                (early / "config.json").write_text("early")

    with pytest.raises(ValueError, match="another process made it meanwhile"):
        late_one()
    assert (output / "config.json").read_text() == "early"
    assert list(tmp_path.iterdir()) == [output]


def test_a_sample_that_is_no_text_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    source = write_source(tmp_path / "source", tokenizer=True)
    assert "sample must be a text file" in refused(monkeypatch, capsys, source, "--sample", tmp_path)
    assert "at least 2 tokens within sample_tokens, got 1" in refused(monkeypatch, capsys, source, "--sample_tokens", 1)
    (source / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json" in refused(monkeypatch, capsys, source)


def test_what_a_config_leaves_out_or_says_in_vain_is_as_transformers_takes_it(tmp_path):
    source = write_source(tmp_path / "qwen", "qwen3", head_dim=None, hidden_size=64, num_attention_heads=2)
    assert read_config(source, "source").config.query_head_dim == 128
    source = write_source(tmp_path / "mistral", "mistral_sliding", layer_types=["full_attention", "sliding_attention"])
    assert read_config(source, "source").config.attention == ["sliding"]


def test_what_becomes_of_a_sliding_window_is_said(tmp_path):
    source = write_source(tmp_path / "source", "mistral_sliding")
    result = convert(source, tmp_path / "out", ["nsa", "sliding"], NSA, RopeChange(), 64, None, 0)
    assert result.config.sliding_window == 10
    assert result.remarks[0].startswith("the source has a sliding_window of 10 tokens: nsa layers see beyond it")


def test_shards_hold_every_tensor_once(tmp_path):
    source = write_source(tmp_path / "source", shard_bytes=20_000)
    weight_map = json.loads((source / weights.INDEX).read_text())["weight_map"]
    found = {name: file.name for file in source.glob("*.safetensors") for name in load_file(file)}
    assert found == weight_map
    assert all(
        file.stat().st_size < 20_000 + 2000 or len(load_file(file)) == 1 for file in source.glob("*.safetensors")
    )
