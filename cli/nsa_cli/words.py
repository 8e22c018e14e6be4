"""What is typed behind `nsa COMMAND`: text stays as it is, everything else is YAML, which jsonargparse reads."""

import json
import re
from argparse import ArgumentParser
from collections import deque
from collections.abc import Collection, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args

from nsa_cli.compat import arguments, type_of
from nsa_cli.lists import element_type

Kind = Literal["text", "texts", "switch", "value"]
"""What a setting holds: a text, a list of texts, true or false, or any other value."""

_OPTION = re.compile(r"--?[A-Za-z]")


class Words(NamedTuple):
    """The same settings in two parts."""

    rest: list[str]  # for jsonargparse; where a text was given, a word in its place
    texts: dict[str, Any]  # each text or list of texts, by its setting


def read_words(words: Sequence[str], parser: ArgumentParser, verbatim: Collection[str] = ()) -> Words:
    """Take the texts out of what was typed.

    A text is the word behind its option, whatever it begins with, unless that is another option of the command. A list
    of texts takes all words up to the next option; given twice, it has the words of both, and `[]` empties it. `--x` is
    `--x true` for a switch.

    Args:
        words: behind the command's name.
        parser: of the command.
        verbatim: lists of texts of which `[a, b]` is one, too; of all others it is the list of a and b.
    """
    options = {flag: action for action in arguments(parser) for flag in action.option_strings}
    rest: list[str] = []
    texts: dict[str, Any] = {}
    lists: dict[str, list[str]] = {}
    waiting = deque(words)
    while waiting:
        word = waiting.popleft()
        flag, equals, value = word.partition("=")
        kind, name = (_kind(options[flag]), options[flag].dest) if flag in options else ("value", "")
        if kind == "value":
            rest.append(word)
            continue
        values = [value] if equals else []
        if kind == "switch":
            given = equals or (waiting and not waiting[0].startswith("-"))
            rest += [word] if given else [word, "true"]
            continue
        if not equals and waiting and waiting[0].partition("=")[0] not in options:
            values.append(waiting.popleft())
        if kind == "text":
            if values:
                texts[name] = values[0]
            rest.append(f"--{name}=text" if values else word)
            continue
        while not equals and waiting and not _OPTION.match(waiting[0]):
            values.append(waiting.popleft())
        found = values if name in verbatim else _listed(values)
        lists[name] = lists.get(name, []) + found if found else []
        texts[name] = lists[name]
        rest.append(f"--{name}=[]")
    return Words(rest, texts)


def _kind(action: Any) -> Kind:
    hint = type_of(action)
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    if kinds == [bool]:
        return "switch"
    if kinds == [str]:
        return "text"
    return "texts" if element_type(hint) is str else "value"


def _listed(words: list[str]) -> list[str]:
    """One word `[a, b]` as the list that it is in YAML, as settings of `nsa fit` are written."""
    import yaml

    if len(words) != 1 or not (words[0].startswith("[") and words[0].endswith("]")):
        return words
    try:
        found = json.loads(words[0])
    except ValueError:
        try:
            found = yaml.safe_load(words[0])
        except yaml.YAMLError:
            return words
    return found if all(isinstance(word, str) for word in found) else words
