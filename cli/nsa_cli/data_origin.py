"""Which of `data.sources`, `data.prepared` and `data.mixture` holds where a later place names another one.

A run has one origin of its text. Configs are merged setting by setting, so what an earlier one says would stay beside
what a later one or the command line says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

ORIGINS = {"--data.sources": "[]", "--data.prepared": "null", "--data.mixture": "null"}
"""The settings, each with the word that clears it."""

_CONFIGS = ("--config", "-c")
_NOTHING = ("", "[]", "{}", "null", "None", "~")


def with_one_origin(words: Sequence[str]) -> list[str]:
    """Clear at the end of a command line what the last place that names an origin takes the place of.

    A config is a place, in the order in which they are given, and the flags together are the last one. What one place
    names twice stays, to be refused.
    """
    configs, flags = [set[str]()], set[str]()
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, given, value = word.partition("=")
        value = value if given else following
        if name in _CONFIGS:
            configs.append(_named_by(value))
        else:
            flag = next((flag for flag in ORIGINS if name == flag or name.startswith((f"{flag}.", f"{flag}+"))), None)
            if flag is not None and value not in _NOTHING and not (value.startswith("--") and not given):
                flags.add(flag)
    places = [place for place in (*configs, flags) if place]
    replaced = set[str]().union(*places[:-1]) - places[-1] if places else set()
    return [*words, *(f"{flag}={empty}" for flag, empty in ORIGINS.items() if flag in replaced)]


def _named_by(config: str) -> set[str]:
    """The origins that a config names: a file, or the text of one. What cannot be read is left to the parser."""
    try:
        path = Path(config).expanduser()
        state = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else config)
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    data = state.get("data") if isinstance(state, Mapping) else None
    return {flag for flag in ORIGINS if isinstance(data, Mapping) and data.get(flag.removeprefix("--data."))}
