"""A command that is a function: the settings are its parameters, the help is its docstring."""

import signal
from collections.abc import Callable, Collection
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings

from nsa_cli.errors import print_error, user_message
from nsa_cli.parser import OneLineParser
from nsa_cli.words import read_words
from nsa_lightning.paths import expand_path


class _Parser(OneLineParser, ArgumentParser):
    """The parser of a command's own settings."""

    @property
    def _command(self) -> str:
        return self.prog.removeprefix("nsa ")


def run_function(
    command: str,
    function: Callable[..., int],
    words: list[str],
    *,
    paths: Collection[str] = (),
    verbatim: Collection[str] = (),
) -> int:
    """Call `function` with the settings that follow `nsa command`; returns the exit status, 2 for a mistake in them.

    Settings are its parameters, and those of the class that it makes of its `**settings`, where it has them.
    Texts reach it as they were typed, but `~` and `$VAR` are expanded in those that are `paths`. A list of texts may be
    written as in YAML, `[a, b]`, unless it is in `verbatim`.
    """
    try:
        settings = parse_settings(command, function, words, verbatim)
        settings |= {name: _expanded(settings[name]) for name in paths if name in settings}
        return function(**settings)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print_error(command, message)
        return 2
    except KeyboardInterrupt:
        print_error(command, "interrupted")
        return 128 + signal.SIGINT


def parse_settings(
    command: str, function: Callable[..., int], words: list[str], verbatim: Collection[str]
) -> dict[str, Any]:
    """The settings in the words that follow a command, as its function takes them.

    Args:
        command: after `nsa`, as its messages name it.
        function: whose parameters the settings are.
        words: as typed.
        verbatim: lists of texts of which `[a, b]` is one text.

    Raises:
        SystemExit: with status 2, after a message, for a mistake in the words.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (function.__doc__ or "").split("Args:")[0].replace("\n    ", "\n").strip()
    parser = _Parser(prog=f"nsa {command}", description=description, allow_abbrev=False)
    parser.add_function_arguments(function, as_group=False)
    rest, texts = read_words(words, parser, verbatim)
    settings = parser.parse_args(rest)
    for name, text in texts.items():
        settings[name] = text
    return parser.instantiate_classes(settings).as_dict()


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [expand_path(each) for each in value]
    return value if value is None else type(value)(expand_path(str(value)))
