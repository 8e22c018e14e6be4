"""How a model starts: by name, on one process and sharded alike; and nothing of it matters to weights that are read."""

import dataclasses
import math

import pytest
import torch
from support.training import NSA, language_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from nsa_lightning.checkpoint.differences import differences
from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.model.initialization import materialise
from nsa_lightning.training.sharding import shard_dimension, shard_transformer

CONFIG = TransformerConfig(
    vocab_size=50, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40, nsa=NSA
)
BRANCHES = ("compressed.", "sliding.")


def started(config=CONFIG, **nsa):
    model = Transformer(dataclasses.replace(config, nsa=dataclasses.replace(config.nsa, **nsa)))
    model.init_weights(seed=3)
    return model


def first(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_branches_that_start_equal_have_the_keys_and_values_of_the_selected_branch():
    model = started(branch_start="equal")
    for layer in model.layers:
        for branch in (layer.self_attn.compressed, layer.self_attn.sliding):
            assert torch.equal(branch.k_proj.weight, layer.self_attn.k_proj.weight)
            assert torch.equal(branch.v_proj.weight, layer.self_attn.v_proj.weight)
            assert branch.k_proj.weight.data_ptr() != layer.self_attn.k_proj.weight.data_ptr()
        assert not torch.equal(layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight)
    one, other = model.layers
    assert not torch.equal(one.self_attn.k_proj.weight, other.self_attn.k_proj.weight)


def test_an_equal_start_changes_the_branches_own_maps_alone():
    independent, equal = first(started()), first(started(branch_start="equal"))
    changed = {name for name, value in independent.items() if not torch.equal(value, equal[name])}
    assert changed == {
        f"layers.{layer}.self_attn.{branch}{part}_proj.weight"
        for layer in (0, 1) for branch in BRANCHES for part in "kv"
    }  # fmt: skip


def test_an_equal_start_does_nothing_where_branches_share_their_maps():
    shared = {"kv_sharing": "shared"}
    ours, theirs = first(started(**shared)), first(started(**shared, branch_start="equal"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("gate", [0.5, 0.9, 0.02])
def test_gate_biases_give_the_gate_that_is_asked_for(gate, hidden):
    model = started(gate_start=gate, gate_hidden_size=hidden)
    for layer in model.layers:
        torch.testing.assert_close(layer.self_attn.branch_gate.bias.sigmoid(), torch.full((12,), gate))
    gates = model.layers[0].self_attn.gates(torch.zeros(3, 32)).detach()
    torch.testing.assert_close(gates, torch.full((3, 4, 3), gate))
    without = first(started(gate_hidden_size=hidden))
    changed = {name for name, value in first(model).items() if not torch.equal(value, without[name])}
    assert changed == ({f"layers.{layer}.self_attn.branch_gate.bias" for layer in (0, 1)} if gate != 0.5 else set())


@pytest.mark.parametrize("gate", [0.0, 1.0, -0.1, math.nextafter(1, 2)])
def test_a_gate_that_no_bias_gives_is_refused(gate):
    with pytest.raises(ValueError, match=f"gate_start must be above 0 and below 1, got {gate}"):
        dataclasses.replace(NSA, gate_start=gate)


def test_a_shard_is_a_part_of_what_one_process_starts_with():
    """Of two ranks, of which this process plays the first."""
    settings = {"branch_start": "equal", "gate_start": 0.8}
    whole = first(started(**settings))
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with torch.device("meta"):
            model = Transformer(dataclasses.replace(CONFIG, nsa=dataclasses.replace(NSA, **settings)))
        shard_transformer(model, init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(), OffloadPolicy())
        materialise(model, torch.device("cpu"))
        model.init_weights(seed=3)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            expected = whole[name].chunk(2, shard_dimension(whole[name], 2))[0]
            assert torch.equal(parameter.to_local(), expected), name
    finally:
        distributed.destroy_process_group()


def test_weights_load_and_runs_resume_whatever_the_settings_of_the_start():
    saved = language_model({"nsa": {"branch_start": "independent"}})
    current = language_model({"nsa": {"branch_start": "equal", "gate_start": 0.9}})
    for module in (saved, current):
        module.configure_model()
    before = first(current.model)
    current.model.load_state_dict(saved.model.state_dict())
    loaded = first(current.model)
    assert all(torch.equal(value, loaded[name]) for name, value in saved.model.named_parameters())
    assert any(not torch.equal(value, loaded[name]) for name, value in before.items())
    settings = [module.hparams["transformer"] for module in (saved, current)]
    assert settings[0] != settings[1]
    assert differences(*settings) == []
    older = {name: value for name, value in settings[0]["nsa"].items() if name not in ("branch_start", "gate_start")}
    assert TransformerConfig.from_dict(settings[0] | {"nsa": older}).nsa == dataclasses.replace(
        saved.transformer_config.nsa, branch_start="equal"
    )  # weights that are loaded do not ask how they began
    assert differences(settings[0] | {"nsa": older}, settings[1]) == []
