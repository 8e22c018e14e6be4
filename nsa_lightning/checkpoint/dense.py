"""Dense Llama-like models of the Hugging Face hub: their config.json as ours, and ours as theirs.

Their weights need no map: the decoder's parameters carry the same names.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from nsa_kernels.errors import SettingError

from nsa_lightning.checkpoint.weights import has_own_head
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.rope import USED_BY_SCALING, RopeConfig

# What a config.json calls the settings of RoPE scaling, and we.
_ROPE_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_max_seq_len",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}
_ROPE_SETTINGS = {
    scaling: tuple(theirs for theirs, ours in _ROPE_NAMES.items() if ours in used)
    for scaling, used in USED_BY_SCALING.items()
}
_KINDS = {"full_attention": "full", "sliding_attention": "sliding"}
_DEFAULT_WINDOW = 4096
"""What `transformers` takes where a family with a window does not give it."""

_FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
"""What the decoder has no other choice of, with the value that a config may leave out."""


class Family(NamedTuple):
    """One architecture of dense models, by what sets it apart."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None  # where a config does not give it; hidden_size / num_attention_heads if not here either


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
}
"""By `model_type`. SmolLM and SmolLM2 are `llama`, Qwen2.5 is `qwen2`."""


class SavedModel(NamedTuple):
    """What a config.json says."""

    config: TransformerConfig
    max_seq_len: int  # the context it is made for, its RoPE scaling included
    remark: str | None = None  # what its files say otherwise


def as_loaded(saved: TransformerConfig, max_seq_len: int, directory: Path, setting: str) -> SavedModel:
    """A config as `transformers` loads it: with the output layer of the weights, if that is not the embedding.

    Raises:
        ValueError: files of the weights are broken.
    """
    saved = replace(saved, context_length=max_seq_len)
    if not saved.tie_embeddings or not has_own_head(directory, setting):
        return SavedModel(saved, max_seq_len)
    remark = (
        f"{directory}: config.json ties the output layer to the embedding, lm_head.weight in its files is another: "
        "that is used, as transformers does"
    )
    return SavedModel(replace(saved, tie_embeddings=False), max_seq_len, remark)


def read_json(path: Path, setting: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(
            f"{setting} must be a directory with a readable {path.name}, got {path.parent}: {error}"
        ) from error
    if not isinstance(content, dict):
        raise SettingError(f"{setting}: {path} must hold an object, got {type(content).__name__}")
    return content


def read_dense_config(directory: Path, setting: str) -> SavedModel:
    """Read the config.json of a dense model; `setting` is what the user calls its directory.

    Raises:
        ValueError: it is of no supported family, lacks a size, or asks for what the decoder does not have.
    """
    path = directory / "config.json"
    raw = read_json(path, setting)
    try:
        return as_loaded(_transformer_config(raw), raw["max_position_embeddings"], directory, setting)
    except ValueError as error:
        raise SettingError(f"{setting}: {path}: {error}") from error
    except (TypeError, AttributeError, KeyError) as error:  # a value of another kind than the key's
        raise SettingError(f"{setting}: {path} is not a dense model's: {error}") from error


def _transformer_config(raw: dict[str, Any]) -> TransformerConfig:
    """The decoder that a config.json describes."""
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise SettingError(f"model_type must be one of {', '.join(FAMILIES)}, got {kind}")
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise SettingError(f"{name} must be {value}, got {raw[name]}")
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [name for name in (*sizes, "max_position_embeddings") if not isinstance(raw.get(name), int)]
    if missing:
        raise SettingError(f"{', '.join(missing)} must be given as whole numbers")
    attention = _layer_kinds(raw, kind)
    window = {"sliding_window": raw.get("sliding_window", _DEFAULT_WINDOW)} if "sliding" in attention else {}
    return TransformerConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or FAMILIES[kind].head_dim or raw["hidden_size"] // raw["num_attention_heads"],
        intermediate_size=raw["intermediate_size"],
        attention=attention,
        rope=_read_rope(raw),
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        qk_norm=FAMILIES[kind].qk_norm,
        qkv_bias=FAMILIES[kind].qkv_bias,
        tie_embeddings=raw.get("tie_word_embeddings", False),
        **window,
    )


def dense_settings(config: TransformerConfig) -> dict[str, Any] | None:
    """The config.json of the family that computes the same as this decoder; None where there is none."""
    shape = config.layer_shape
    kinds = set(config.attention)
    candidates = {"full": FAMILIES, "sliding": {"mistral": FAMILIES["mistral"]}}.get("".join(kinds), {})
    fitting = [
        name
        for name, family in candidates.items()
        if (family.qkv_bias, family.qk_norm) == (shape.qkv_bias, shape.qk_norm)
        and shape.head_dim == shape.value_head_dim
    ]
    if not fitting:
        return None
    window = {"sliding_window": config.sliding_window} if kinds == {"sliding"} else {}
    return {
        "architectures": [FAMILIES[fitting[0]].architecture],
        "model_type": fitting[0],
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _write_rope(config.rope),
        "hidden_act": "silu",
        **window,
    }


def shared_settings(config: TransformerConfig) -> dict[str, Any]:
    """What every config.json holds, under the names that tools look for."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.query_head_dim,
        "tie_word_embeddings": config.tie_embeddings,
    }


def shortest_pattern(kinds: list[str]) -> list[str]:
    """The shortest list that, repeated, is `kinds`."""
    sizes = (size for size in range(1, len(kinds) + 1) if len(kinds) % size == 0)
    return next(kinds[:size] for size in sizes if kinds[:size] * (len(kinds) // size) == kinds)


def _layer_kinds(raw: dict[str, Any], family: str) -> list[str]:
    """`full` or `sliding` by layer, as the shortest list."""
    layers = raw["num_hidden_layers"]
    used = family == "mistral" or (family != "llama" and raw.get("use_sliding_window", False))
    if not used or raw.get("sliding_window", _DEFAULT_WINDOW) is None:
        return ["full"]
    if raw.get("layer_types") and family != "mistral":  # which has the window in every layer, whatever they say
        unknown = sorted(set(raw["layer_types"]) - _KINDS.keys())
        if unknown or len(raw["layer_types"]) != layers:
            raise SettingError(f"layer_types must name {', '.join(_KINDS)} by layer, got {raw['layer_types']}")
        return shortest_pattern([_KINDS[kind] for kind in raw["layer_types"]])
    first = 0 if family == "mistral" else raw.get("max_window_layers", 28)
    kinds = ["full" if index < first else "sliding" for index in range(layers)]
    return shortest_pattern(kinds)


def _read_rope(raw: dict[str, Any]) -> RopeConfig:
    """The rotary embedding that `transformers` reads: an older name of a setting has precedence over the newer one."""
    given = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    layers = sorted(name for name, value in given.items() if isinstance(value, dict))
    if layers:
        raise SettingError(f"rope_parameters must be the same for every layer, got some for {', '.join(layers)}")
    theta = given.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    named = given.pop("rope_type", None), given.pop("type", None)
    kind = (named[0] or named[1] or "default").replace("default", "none")
    if kind not in _ROPE_SETTINGS:
        names = ", ".join(_ROPE_SETTINGS).replace("none", "default")
        raise SettingError(f"the type of RoPE scaling must be one of {names}, got {kind}")
    if kind in ("llama3", "yarn"):
        original = given.get("original_max_position_embeddings") or raw["max_position_embeddings"]
        given["original_max_position_embeddings"] = raw.get("original_max_position_embeddings") or original
    given = {name: value for name, value in given.items() if value is not None}
    if kind != "none" and "factor" not in given:
        raise SettingError(f"RoPE scaling {kind} must give its factor")
    harmless = {"truncate": True, "partial_rotary_factor": 1.0}
    for name, value in given.items():
        if name not in (*_ROPE_SETTINGS[kind], "original_max_position_embeddings") and harmless.get(name) != value:
            raise SettingError(f"{name}={value} of RoPE scaling {kind} is not supported")
    settings = {_ROPE_NAMES[name]: given[name] for name in _ROPE_SETTINGS[kind] if name in given}
    return RopeConfig(theta=theta, scaling=cast("Any", kind), **settings)


def _write_rope(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.scaling == "none":
        return None
    settings = {name: getattr(rope, _ROPE_NAMES[name]) for name in _ROPE_SETTINGS[rope.scaling]}
    return {"rope_type": rope.scaling} | {name: value for name, value in settings.items() if value is not None}
