"""What differs between the settings of two decoders, among those that change what they compute."""

from typing import Any

from nsa_lightning.model.config import ATTENTION_KINDS
from nsa_lightning.model.rope import USED_BY_SCALING

_FREE = {"max_seq_len", "context_length", "backend", "branch_start", "gate_start"}
"""What may change freely: lengths, how the same is computed, and how weights start that a checkpoint has anyway."""


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Settings of model.transformer whose value changed, as `name was …, is …`."""
    return _changed(_effective(saved), _effective(current), "")


def _effective(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without those that do nothing beside the others."""
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    attention = kept.get("attention") or []
    for name, kind in ATTENTION_KINDS.items():
        if name not in attention:
            for setting in kind.settings:
                kept.pop(setting, None)
    if "rope" in kept:
        used = ("theta", "scaling", *USED_BY_SCALING[kept["rope"].get("scaling", "none")])
        kept["rope"] = {name: value for name, value in kept["rope"].items() if name in used}
    if kept.get("head_dim") is None and {"hidden_size", "num_heads"} <= kept.keys():
        kept["head_dim"] = kept["hidden_size"] // kept["num_heads"]
    if kept.get("value_head_dim") is None:
        kept["value_head_dim"] = kept.get("head_dim")
    if attention and "num_layers" in kept:
        kept["attention"] = list(attention) * (kept["num_layers"] // len(attention))
    return kept


def _changed(saved: dict[str, Any], current: dict[str, Any], prefix: str) -> list[str]:
    found = []
    for name in sorted(saved.keys() & current.keys() - _FREE):
        old, new = saved[name], current[name]
        if isinstance(old, dict) and isinstance(new, dict):
            found += _changed(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(f"{prefix}{name} was {old}, is {new}")
    return found
