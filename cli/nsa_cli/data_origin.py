"""Which of `data.sources`, `data.prepared` and `data.mixture` holds where a later place names another one.

A run has one origin of its text. Configs are merged setting by setting, so what an earlier one says would stay beside
what a later one or the command line says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from nsa_lightning.paths import expand_path

ORIGINS = {"--data.sources": "[]", "--data.prepared": "null", "--data.mixture": "null"}
"""The settings, each with the word that clears it."""

_CHOICE = {"--data.include": "[]", "--data.exclude": "[]"}
"""What chooses among the files of `data.sources` and goes with them."""

_CONFIGS = ("--config", "-c")
_NOTHING = ("", "[]", "{}", "null", "None", "~")


def with_one_origin(words: Sequence[str]) -> list[str]:
    """Clear at the end of a command line what the last place that names an origin takes the place of.

    A config is a place, in the order in which they are given, and the flags together are the last one. What one place
    names twice stays, to be refused. Where sources are cleared, what earlier places choose among them is, too.
    """
    configs, flags, known = [set[str]()], set[str](), ORIGINS | _CHOICE
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, given, value = word.partition("=")
        value = value if given else following
        if name in _CONFIGS:
            configs.append(_named_by(value))
        else:
            flag = next((flag for flag in known if name == flag or name.startswith((f"{flag}.", f"{flag}+"))), None)
            if flag is not None and value not in _NOTHING and not (value.startswith("--") and not given):
                flags.add(flag)
    places = [*configs, flags]
    last = max((index for index, place in enumerate(places) if place & ORIGINS.keys()), default=0)
    replaced = set[str]().union(*places[:last]) - set[str]().union(*places[last:])
    if "--data.sources" not in replaced:
        replaced -= _CHOICE.keys()
    return [*words, *(f"{flag}={empty}" for flag, empty in known.items() if flag in replaced)]


def _named_by(config: str) -> set[str]:
    """What a config names of them: a file, or the text of one. What cannot be read is left to the parser."""
    try:
        path = Path(expand_path(config))
        state = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else config)
    except (OSError, ValueError, yaml.YAMLError):
        return set()
    data = state.get("data") if isinstance(state, Mapping) else None
    return {flag for flag in ORIGINS | _CHOICE if isinstance(data, Mapping) and data.get(flag.removeprefix("--data."))}
