"""The Python API refuses in every config class, and in what takes settings itself, what the command line refuses."""

import dataclasses
import types
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from nsa_kernels import NSAConfig, SettingError
from torch.optim import AdamW

from nsa_lightning.checkpoint.convert import RopeChange
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sets import MixtureSet
from nsa_lightning.data.tokenizer import TokenizerConfig
from nsa_lightning.generation.device import choose_dtype
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.generation.sampling import SamplingConfig
from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.model.config import NSALayerConfig
from nsa_lightning.model.rope import RopeConfig
from nsa_lightning.training.callbacks.continuations import Continuations
from nsa_lightning.training.callbacks.gates import GateMonitor
from nsa_lightning.training.callbacks.loss_guard import LossGuard
from nsa_lightning.training.distillation import Distillation
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import NewParts, WarmupCosine, WarmupStableDecay
from nsa_lightning.training.strategy import FSDP2Strategy

CONFIGS = [
    NSAConfig, NSALayerConfig, TransformerConfig, RopeConfig, NewParts, Distillation, TokenizerConfig, SamplingConfig,
    StopConfig, RopeChange, MixtureSet,
]  # fmt: skip
NEEDED: dict[type, dict[str, Any]] = {MixtureSet: {"prepared": "a"}}
CLASSES = [
    LanguageModel, WarmupCosine, WarmupStableDecay, LossGuard, GateMonitor, Continuations, FSDP2Strategy,
]  # fmt: skip


def wrong_values(hint: Any) -> list[Any]:
    """Values that a type does not take; none for types that say nothing."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if isinstance(hint, types.UnionType):
        return [value for value in wrong_values(parts[0]) if value is not None]
    if origin is Literal:
        return [parts[0].upper() + "x", [parts[0]], True, None]
    if origin in (list, tuple):
        return ["nsa", 3, [object()]]
    return {int: [True, 1.0, "1"], float: [True, "1", float("nan")], bool: [1, "true"], str: [3]}.get(
        origin, [object()]
    )


def cases(owners, hints_of):
    return [
        pytest.param(owner, name, value, id=f"{owner.__name__}.{name}={value!r:.12}")
        for owner in owners
        for name, hint in hints_of(owner).items()
        if name != "return"
        for value in wrong_values(hint)
    ]


@pytest.mark.parametrize(
    ("config", "name", "value"),
    cases(CONFIGS, lambda config: {f.name: get_type_hints(config)[f.name] for f in dataclasses.fields(config)}),
)
def test_every_field_of_every_config_refuses_other_types_by_its_name(config, name, value):
    with pytest.raises(SettingError, match=f"{name} must be .*, got "):
        config(**(NEEDED.get(config, {}) | {name: value}))


@pytest.mark.parametrize(("owner", "name", "value"), cases(CLASSES, lambda owner: get_type_hints(owner.__init__)))
def test_every_argument_of_what_takes_settings_refuses_other_types_by_its_name(owner, name, value):
    if name == "transformer" and isinstance(value, dict):
        pytest.skip("saved settings")
    with pytest.raises(SettingError, match=f"{name} must be .*, got "):
        owner(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("packing", "bestfit"), ("seq_len", 8.0), ("batch_size", True), ("val_fraction", float("nan")), ("seed", "0"),
     ("skip_binary", "no"), ("sources", 3), ("mixture", ["a"]), ("tokenizer", {}), ("curriculum", {"0": 8})],
)  # fmt: skip
def test_the_data_module_refuses_other_types_by_their_name(name, value):
    with pytest.raises(SettingError, match=rf"^data\.{name} must be .*, got "):
        PackedTextDataModule(**({"sources": "a"} | {name: value}))


def test_names_of_recomputation_attention_and_dtypes_are_checked_where_they_are_used():
    config = TransformerConfig(num_layers=1, hidden_size=8, num_heads=1, num_kv_heads=1, vocab_size=8)
    with pytest.raises(SettingError, match=r"^recompute must be one of none, block, selective, got 'blocks'$"):
        Transformer(config, recompute="blocks")
    names = r"^attention must be a list of values that are each one of nsa, full, sliding, got \['local'\]$"
    with pytest.raises(SettingError, match=names):
        dataclasses.replace(config, attention=["local"])
    with pytest.raises(SettingError, match=r"^dtype must be one of auto, float32, bfloat16, float16, got 'fp8'$"):
        choose_dtype("fp8", None)
    LanguageModel(config, optimizer=AdamW, activation_checkpointing="selective")
