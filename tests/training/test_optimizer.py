import itertools
import math

import pytest
import torch

from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.training.optimizer import NewParts, WarmupCosine, WarmupStableDecay, parameter_groups


def test_weight_decay_goes_to_matrices_only():
    model = Transformer(
        TransformerConfig(
            vocab_size=16,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=16,
            qkv_bias=True,
        )
    )
    groups = parameter_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert all(("weight_decay" in group) == ("undecayed" in group["name"]) for group in groups)
    assert sum(map(len, found.values())) == len(names)
    assert all("norm" in name or "bias" in name for name in found["undecayed"])
    assert found["decayed"] >= {"embed_tokens.weight", "layers.0.self_attn.k_proj.weight"}
    summaries = {f"layers.0.self_attn.{kind}_summary.{part}_weight" for kind in "kv" for part in ("in", "out")}
    assert found["new_parts_decayed"] == {"layers.0.self_attn.branch_gate.weight"} | summaries
    assert all("branch_gate.bias" in name or "_summary." in name for name in found["new_parts_undecayed"])
    assert len(found["new_parts_undecayed"]) == 7


def test_frozen_parameters_are_not_optimised():
    model = torch.nn.Linear(3, 3)
    model.weight.requires_grad_(False)
    (group,) = parameter_groups(model)
    assert group["params"] == [model.bias]


def test_cosine_rises_linearly_and_falls_to_the_final_ratio():
    schedule = WarmupCosine(warmup_steps=10, final_ratio=0.1)
    factors = [schedule.factor(step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_stable_decay_is_flat_and_then_falls_linearly():
    schedule = WarmupStableDecay(warmup_steps=10, decay_ratio=0.2, final_ratio=0.0)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert set(factors[10:80]) == {1.0}
    assert factors[90] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)


def test_training_beyond_the_end_stays_at_the_final_ratio():
    assert WarmupCosine(warmup_steps=1, final_ratio=0.2).factor(500, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: WarmupCosine(warmup_steps=-1), "schedule.warmup_steps must be at least 0, got -1"),
        (lambda: WarmupCosine(final_ratio=1.5), "schedule.final_ratio must be from 0 to 1, got 1.5"),
        (lambda: NewParts(lr_factor=0.0), "new_parts.lr_factor must be above 0 and finite, got 0.0"),
        (lambda: NewParts(lr_factor=float("nan")), "new_parts.lr_factor must be a finite number, got nan"),
        (lambda: NewParts(freeze_others_steps=-1), "new_parts.freeze_others_steps must be at least 0, got -1"),
        (lambda: WarmupStableDecay(decay_ratio=0.0), "schedule.decay_ratio must be above 0 and at most 1, got 0.0"),
    ],
)
def test_impossible_settings_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
