"""A command that is a function: the settings are its parameters, the help is its docstring."""

import signal
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from nsa_kernels.errors import SettingError

from nsa_cli.errors import print_error
from nsa_cli.words import read_words


class _Parser(ArgumentParser):
    """A parser that says a mistake in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        print_error(self.prog.removeprefix("nsa "), " ".join(message.split()))
        sys.exit(2)


def run_function(command: str, function: Callable[..., int], words: list[str], verbatim: Collection[str] = ()) -> int:
    """Call `function` with the settings that follow `nsa command`; returns the exit status, 2 for a mistake in them.

    Texts reach it as they were typed. A list of texts may be written as in YAML, `[a, b]`, unless it is in `verbatim`.
    """
    try:
        return function(**_parse(command, function, words, verbatim))
    except SettingError as error:
        print_error(command, str(error))
        return 2
    except KeyboardInterrupt:
        print_error(command, "interrupted")
        return 128 + signal.SIGINT


def _parse(command: str, function: Callable[..., int], words: list[str], verbatim: Collection[str]) -> dict[str, Any]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (function.__doc__ or "").split("Args:")[0].replace("\n    ", "\n").strip()
    parser = _Parser(prog=f"nsa {command}", description=description, allow_abbrev=False)
    parser.add_function_arguments(function, as_group=False)
    rest, texts = read_words(words, parser, verbatim)
    settings = parser.parse_args(rest)
    for name, text in texts.items():
        settings[name] = text
    return parser.instantiate_classes(settings).as_dict()
