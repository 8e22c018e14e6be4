"""`nsa bench WHAT`: finds the measurement and runs it."""

import sys
from collections.abc import Callable

from nsa_cli.function_command import run_function
from nsa_lightning.benchmark.kernels import bench_kernels
from nsa_lightning.benchmark.loader import bench_loader

_BENCHMARKS: dict[str, Callable[..., int]] = {"kernels": bench_kernels, "loader": bench_loader}

_HELP = """usage: nsa bench WHAT [options]

Measure the attention operator, or what feeds it.

benchmarks:
{benchmarks}

  nsa bench WHAT --help    every setting of a benchmark

example:
  nsa bench kernels --shapes A --lengths 8192 16384 --output_dir runs/bench
"""


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
    return run_function(f"bench {name}", _BENCHMARKS[name], sys.argv[3:])
