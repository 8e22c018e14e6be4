"""What all parsers of the `nsa` command share: the same types whatever was imported, and mistakes in one line."""

import argparse
import difflib
import functools
import operator
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

from nsa_cli.compat import arguments, option_strings, set_type, subcommand_parsers, type_of
from nsa_cli.errors import print_error
from nsa_cli.lists import join_lists

_CLOSE_ENOUGH = 0.75
"""How alike a name must be to be suggested in the place of an unknown one, by `difflib`."""
_LINK_FAILURE = re.compile(r"^Call to compute_fn of link .*? failed: ", re.DOTALL)
_UNKNOWN_KEY = re.compile(r"(?:Group '(?P<group>[^']+)' does not accept option|accept option|Option) '(?P<key>[^']+)'")


class OneLineParser(argparse.ArgumentParser):
    """Mixed into a parser of jsonargparse.

    jsonargparse makes the parsers of nested classes of the same class, and copies `add_argument` to its groups.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument whose number is an int where it can be one."""
        action = super().add_argument(*args, **kwargs)  # which has the type, as jsonargparse reads it
        if type_of(action) is not None:
            set_type(action, with_int_first(type_of(action)))
        return action

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Parse, with lists written as `--lengths 8192 16384` too."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(join_lists(words, self._types(), self._options()), *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message in one line, with the name that was probably meant, and exit with status 2."""
        print_error(self._command, one_line(message) + self._suggestion(message))
        sys.exit(2)

    @property
    def _command(self) -> str:
        return sys.argv[1]

    def _parsers(self) -> Iterable["OneLineParser"]:
        """This one and those of its subcommands."""
        yield self
        yield from subcommand_parsers(self)

    def _types(self) -> dict[str, Any]:
        """The types of settings by their flags."""
        actions = [action for parser in self._parsers() for action in arguments(parser)]
        return {flag: type_of(action) for action in actions for flag in action.option_strings}

    def _options(self) -> list[str]:
        return [option for parser in self._parsers() for option in option_strings(parser)]

    def _suggestion(self, message: str) -> str:
        """`; did you mean …?` where the message is of a setting that does not exist and another is called alike."""
        flags = [option for option in self._options() if option.startswith("--") and not option.endswith("+")]
        unrecognized = message.removeprefix("unrecognized arguments: ")
        if unrecognized != message:
            words = [word.partition("=")[0] for word in unrecognized.split() if word.startswith("--")]
            return suggestion(words[0], flags) if words else ""
        unknown = _UNKNOWN_KEY.search(message)
        if unknown is None:
            return ""
        key = f"{unknown['group']}.{unknown['key']}" if unknown["group"] else unknown["key"]
        return suggestion(key, [flag.removeprefix("--") for flag in flags])


def suggestion(name: str, known: Collection[str]) -> str:
    """`; did you mean …?` with the known name that is most like `name`, or nothing if none is.

    A name without its groups is as good as with them: `max_steps` is `trainer.max_steps`.
    """
    found = difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE_ENOUGH)
    leaf = name.lstrip("-").rpartition(".")[2]
    same_leaf = [each for each in known if each.lstrip("-").rpartition(".")[2] == leaf]
    if len(same_leaf) == 1 and not (found and difflib.SequenceMatcher(None, name, found[0]).ratio() > 0.9):
        found = same_leaf
    return f"; did you mean {found[0]}?" if found else ""


def with_int_first(kind: Any) -> Any:
    """A type in which `int` comes before `float` in every union.

    jsonargparse tries the members of a union in their order, and a float takes every int: 1, of batches, would become
    1.0, of all. The order is not what the source says but what `typing` has cached: `Union[int, float]` is
    `Union[float, int]` where another library has written that first.
    """
    origin, members = get_origin(kind), get_args(kind)
    if origin not in (Union, UnionType, list, dict, tuple):
        return kind
    ordered = [with_int_first(member) for member in members]
    if origin in (Union, UnionType) and {int, float} <= set(ordered):
        ordered.remove(int)
        ordered.insert(ordered.index(float), int)
    if all(new is old for new, old in zip(ordered, members, strict=True)):
        return kind
    return functools.reduce(operator.or_, ordered) if origin in (Union, UnionType) else origin[tuple(ordered)]


def one_line(message: str) -> str:
    """jsonargparse's words for a mistake, without its tree of everything that was tried."""
    message = _LINK_FAILURE.sub("", message.strip())
    key = re.match(r'Parser key "(?P<key>[^"]+)":\s*', message)
    if key is None:
        return " ".join(message.split())
    rest = message[key.end() :]
    given = re.search(r"(?:\. Got value: |\nGiven value: |\n *Given value: )(?P<value>.*)\Z", rest, re.DOTALL)
    value = f", got {_value(given['value'])}" if given else ""
    problems = re.findall(
        r"Problem with given class_path '([^']+)':\s*(.*?)(?=\n *- |\n *Given value|\Z)", rest, re.DOTALL
    )
    if problems:
        name, problem = problems[0]
        return f"{key['key']}: {name}: {' '.join(problem.split())}"
    expected = re.findall(r"Expected an? (.*?)(?=\. Got value|\n|\Z)", rest)
    got = re.search(r"dot import path string: (\S+)", rest)
    if expected and got and not given:
        value = f", got {got[1]}"
    elif not expected or not given:
        return f"{key['key']}: {' '.join(rest.split()).removeprefix('- ')}"
    words = [_type_name(each) for each in expected if not re.search("NoneType|^path but", each)]
    return f"{key['key']} must be {' or '.join(dict.fromkeys(words))}{value}"


def _value(text: str) -> str:
    """What the user gave, of a nested setting with its name."""
    nested = re.fullmatch(r"NestedArg\(key='(?P<key>[^']*)', val='?(?P<value>.*?)'?\)", text.strip())
    return f"{nested['key']}={nested['value']}" if nested else " ".join(text.split())


def _type_name(text: str) -> str:
    """`a <class 'collections.abc.Iterable'>` in a user's words."""
    text = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", text)
    if text.startswith("dot import path string"):
        return "the name of a class"
    literal = re.fullmatch(r"typing\.Literal\[(.*)\]", text)
    if literal:
        return literal[1].replace("'", "")
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "Iterable": "a list",
    }.get(text, text)
