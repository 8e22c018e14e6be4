"""What reading settings needs of jsonargparse and argparse that they do not promise to keep.

tests/cli/test_compat.py checks each part.
"""

import argparse
from collections.abc import Iterator
from typing import Any


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a parser, without those of its subcommands."""
    return parser._actions


def option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """All flags of a parser, without those of its subcommands."""
    return list(parser._option_string_actions)


def subcommand_parsers(parser: argparse.ArgumentParser) -> Iterator[Any]:
    """The parsers of a parser's subcommands that it has so far."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from dict.fromkeys(action.choices.values())


def type_of(action: argparse.Action) -> Any:
    """The type that jsonargparse reads an argument as; None where argparse alone reads it."""
    return getattr(action, "_typehint", None)


def set_type(action: argparse.Action, kind: Any) -> None:
    """Have jsonargparse read an argument as another type."""
    action._typehint = kind  # type: ignore[attr-defined]
