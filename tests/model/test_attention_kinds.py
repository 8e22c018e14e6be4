"""docs/attention-kinds.md, done as it says: its file and its line are all that a new kind needs."""

import dataclasses
import importlib.util
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from support.packings import cu_seqlens
from support.training import data_module, language_model, make_trainer, write_corpus

from nsa_lightning.checkpoint.differences import differences
from nsa_lightning.memory.estimate import estimate_memory
from nsa_lightning.memory.settings import StepSettings
from nsa_lightning.model import Cache, Transformer, TransformerConfig
from nsa_lightning.model.attention.registry import is_new_part
from nsa_lightning.model.cached import decode, prefill
from nsa_lightning.model.config import ATTENTION_KINDS
from nsa_lightning.model.flops import training_flops
from nsa_lightning.training.optimizer import parameter_groups

PAGE = Path(__file__).parents[2] / "docs" / "attention-kinds.md"
CONFIG = {
    "vocab_size": 50, "hidden_size": 24, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 40,
    "sliding_window": 5, "attention": ["mean", "sliding"],
}  # fmt: skip
LENGTHS = [1, 45, 3, 20]


@pytest.fixture(autouse=True)
def kind(tmp_path, monkeypatch):
    """Steps 1 and 2: the page's file, and its line in the registry for as long as a test lasts."""
    source, line, *_ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    path = tmp_path / "mean.py"
    path.write_text(source)
    specification = importlib.util.spec_from_file_location("attention_kind_of_the_page", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for name, made in eval(f"{{{line}}}", vars(module)).items():
        monkeypatch.setitem(ATTENTION_KINDS, name, made)
    return module


@pytest.fixture
def config():
    return TransformerConfig(**CONFIG)


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return Transformer(config).double()


def packed(lengths):
    tokens = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return tokens, torch.cat([torch.arange(length) for length in lengths]), cu_seqlens(lengths), max(lengths)


def test_settings_name_it_beside_the_others(config):
    assert config.layer_attention == ["mean", "sliding", "mean", "sliding"]
    with pytest.raises(ValueError, match="each one of nsa, full, sliding, mean, got"):
        dataclasses.replace(config, attention=["median"])


def test_packed_documents_do_not_see_each_other(model):
    tokens, positions, offsets, longest = packed(LENGTHS)
    hidden = model(tokens, positions, offsets, longest).hidden
    alone = [model(tokens[a:b], positions[a:b], cu_seqlens([b - a]), b - a).hidden for a, b in pairwise(offsets)]
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("joined", [False, True])
def test_prefill_and_decode_equal_the_whole_document(model, joined):
    tokens, *where = packed([40])
    expected = model(tokens, *where).hidden.detach()
    model.requires_grad_(False)
    if joined:
        model.join_projections()
    cache = Cache.allocate(model.config, 2, 20, dtype=torch.float64)
    for row in (0, 1):  # a row that is reset begins anew
        prefill(model, tokens[:15], cache, row)
    cache.reset(0)
    cache = cache.grown(45)
    hidden = [prefill(model, tokens[:30], cache, 0, chunk_size=8)]
    hidden += [decode(model, token.repeat(2), cache)[0] for token in tokens[30:]]
    torch.testing.assert_close(torch.stack(hidden), expected[29:], rtol=1e-9, atol=1e-9)
    assert Cache.bytes_needed(model.config, 2, 45, torch.float64) == cache.num_bytes


def test_it_trains(tmp_path):
    write_corpus(tmp_path)
    module = language_model({"attention": ["mean", "nsa"]}, activation_checkpointing="selective")
    before = {}
    module.configure_model()
    before |= {name: value.detach().clone() for name, value in module.named_parameters()}
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data_module(tmp_path))
    assert trainer.global_step == 2
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert {f"model.layers.0.self_attn.{part}.weight" for part in ("v_proj", "mean_gate", "o_proj")} <= moved


def test_it_starts_as_it_says(model):
    gate = model.layers[0].self_attn.mean_gate
    assert gate.bias.tolist() == [4, 4]
    assert not gate.weight.any()
    assert model.layers[0].self_attn.v_proj.weight.std() > 0.1


def test_its_flops_are_those_of_its_maps_and_pairs(model):
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    windows = 5 * 6 // 2 + 5 * 5  # pairs of a document of 10 tokens
    assert training_flops(model, np.array([10])) == 6 * (10 * linear + 2 * windows * 4 * 12)


def test_its_gates_are_new_parts_of_the_optimizer(model):
    assert is_new_part("layers.0.self_attn.mean_gate.bias")
    assert not is_new_part("layers.0.self_attn.v_proj.weight")
    groups = {group["name"]: group["params"] for group in parameter_groups(model)}
    gates = {id(parameter) for layer in (0, 2) for parameter in model.layers[layer].self_attn.mean_gate.parameters()}
    assert {id(p) for name in ("new_parts_decayed", "new_parts_undecayed") for p in groups[name]} == gates


def test_it_returns_no_statistics_and_other_kinds_still_do():
    mixed = language_model({"attention": ["mean", "nsa"]})
    mixed.configure_model()
    assert list(mixed.model(*packed(LENGTHS), watch=True).statistics) == [1]


def test_settings_of_other_kinds_do_not_count_beside_it(config):
    alone = dataclasses.replace(config, attention=["mean"])
    changed = dataclasses.replace(alone, sliding_window=7)
    assert differences(dataclasses.asdict(alone), dataclasses.asdict(changed)) == []
    mixed = dataclasses.replace(config, sliding_window=7)
    assert differences(dataclasses.asdict(config), dataclasses.asdict(mixed)) == ["sliding_window was 5, is 7"]


def test_its_memory_is_estimated():
    pytest.importorskip("triton")
    settings = StepSettings(
        strategy="auto", world_size=1, parameter_dtype=torch.float32, compute_dtype=torch.bfloat16, seq_len=256,
        batch_size=1,
    )  # fmt: skip

    def peak(**changes):
        return estimate_memory(language_model({"attention": ["mean"], "num_layers": 1, **changes}), settings)

    one, two = (peak(value_head_dim=size).worst[1].total for size in (8, 16))
    assert 0 < one < two
