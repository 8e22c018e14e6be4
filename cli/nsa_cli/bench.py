"""`nsa bench WHAT`: parses the settings of a measurement and runs it."""

import sys
from collections.abc import Callable
from typing import NoReturn, get_origin, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from nsa_cli.errors import print_error, raised_by_own_code
from nsa_lightning.benchmark.kernels import bench_kernels

_BENCHMARKS: dict[str, Callable[..., int]] = {"kernels": bench_kernels}

_HELP = """usage: nsa bench WHAT [options]

Measure the attention operator.

benchmarks:
{benchmarks}

  nsa bench WHAT --help    every setting of a benchmark

example:
  nsa bench kernels --shapes A --lengths 8192 16384 --output_dir runs/bench
"""


class _Parser(ArgumentParser):
    """A parser that says a mistake in one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and exit with status 2."""
        print_error(" ".join(sys.argv[1:3]), " ".join(message.split()))
        sys.exit(2)


def run() -> int:
    """Run the benchmark that `sys.argv` names; returns the exit status, 2 for a mistake in the settings."""
    name = sys.argv[2] if len(sys.argv) > 2 else "--help"
    if name in ("-h", "--help"):
        lines = (f"  {name:<12}{(function.__doc__ or '').splitlines()[0]}" for name, function in _BENCHMARKS.items())
        print(_HELP.format(benchmarks="\n".join(lines)))
        return 0
    if name not in _BENCHMARKS:
        print(f"nsa bench: error: no benchmark {name!r}; the benchmarks are {', '.join(_BENCHMARKS)}", file=sys.stderr)
        return 2
    function = _BENCHMARKS[name]
    settings = _parse(name, function, sys.argv[3:])
    try:
        return function(**settings.as_dict())
    except ValueError as error:
        if not raised_by_own_code(error):
            raise
        print_error(" ".join(sys.argv[1:3]), str(error))
        return 2


def _parse(name: str, function: Callable[..., int], words: list[str]) -> Namespace:
    description = (function.__doc__ or "").split("Args:")[0].replace("\n    ", "\n").strip()
    parser = _Parser(prog=f"nsa bench {name}", description=description, allow_abbrev=False)
    parser.add_function_arguments(function, as_group=False)
    lists = [setting for setting, kind in get_type_hints(function).items() if get_origin(kind) is list]
    return parser.parse_args(_bracketed(words, {f"--{setting}" for setting in lists}))


def _bracketed(words: list[str], flags: set[str]) -> list[str]:
    """`--lengths 8192 16384` as `--lengths [8192,16384]`, which jsonargparse reads as a list."""
    joined: list[str] = []
    values: list[str] | None = None
    for word in [*words, "--"]:
        if values is not None and not word.startswith("--"):
            values.append(word)
            continue
        if values is not None:
            joined.append(values[0] if len(values) == 1 and values[0].startswith("[") else f"[{','.join(values)}]")
        joined.append(word)
        values = [] if word in flags else None
    return joined[:-1]
