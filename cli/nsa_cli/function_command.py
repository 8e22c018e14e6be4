"""A command that is a function: the settings are its parameters, the help is its docstring."""

import json
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings
from nsa_kernels.errors import SettingError

from nsa_cli.errors import print_error


class _Parser(ArgumentParser):
    """A parser that says a mistake in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        print_error(self.prog.removeprefix("nsa "), " ".join(message.split()))
        sys.exit(2)


def run_function(command: str, function: Callable[..., int], words: list[str]) -> int:
    """Call `function` with the settings that follow `nsa command`; returns the exit status, 2 for a mistake in them."""
    try:
        return function(**_parse(command, function, words))
    except SettingError as error:
        print_error(command, str(error))
        return 2
    except KeyboardInterrupt:
        print_error(command, "interrupted")
        return 128 + signal.SIGINT


def _parse(command: str, function: Callable[..., int], words: list[str]) -> dict[str, Any]:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    description = (function.__doc__ or "").split("Args:")[0].replace("\n    ", "\n").strip()
    parser = _Parser(prog=f"nsa {command}", description=description, allow_abbrev=False)
    parser.add_function_arguments(function, as_group=False)
    lists = {
        f"--{name}": get_args(kind)[0] for name, kind in get_type_hints(function).items() if get_origin(kind) is list
    }
    return parser.instantiate_classes(parser.parse_args(_bracketed(words, lists))).as_dict()


def _bracketed(words: list[str], lists: dict[str, type]) -> list[str]:
    """`--lengths 8192 16384` as `--lengths [8192, 16384]`, which jsonargparse reads as a list."""
    joined: list[str] = []
    values: list[str] = []
    flag: str | None = None
    for word in [*words, "--"]:
        if flag is not None and not word.startswith("--"):
            values.append(word)
            continue
        if flag is not None:
            quoted = [json.dumps(value) if lists[flag] is str else value for value in values]
            joined.append(values[0] if len(values) == 1 and values[0].startswith("[") else f"[{', '.join(quoted)}]")
        joined.append(word)
        flag, values = (word if word in lists else None), []
    return joined[:-1]
