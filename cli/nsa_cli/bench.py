"""`nsa bench WHAT`: finds the measurement and runs it."""

import inspect
import json
import sys
from collections.abc import Callable

from nsa_cli.function_command import run_function
from nsa_cli.parser import suggestion
from nsa_lightning.benchmark.decode import bench_decode
from nsa_lightning.benchmark.kernels import bench_kernels
from nsa_lightning.benchmark.loader import bench_loader
from nsa_lightning.benchmark.study import bench_study
from nsa_lightning.benchmark.training import bench_training

_BENCHMARKS: dict[str, Callable[..., int]] = {
    "kernels": bench_kernels,
    "decode": bench_decode,
    "loader": bench_loader,
    "training": bench_training,
    "study": bench_study,
}

_PATHS = {"cache_dir", "config", "output_dir", "prepared"}

_HELP = """usage: nsa bench WHAT [options]

Measure the attention operator, decoding with it, what feeds it, or training as a whole; compare finished runs.

benchmarks:
{benchmarks}

  nsa bench WHAT --help    every setting of a benchmark

example:
  nsa bench kernels --shapes A --lengths 8192 16384 --output_dir runs/bench
  nsa bench decode --config configs/nsa_1b.yaml --lengths 16384 131072 --batch_sizes 1 8
  nsa bench training --config configs/nsa_1b.yaml --lengths 32768 --devices 1 2
"""


def run() -> int:
    """Run the benchmark that `sys.argv` names; returns the exit status, 2 for a mistake in the settings."""
    name = sys.argv[2] if len(sys.argv) > 2 else "--help"
    if name in ("-h", "--help"):
        lines = (f"  {name:<12}{(function.__doc__ or '').splitlines()[0]}" for name, function in _BENCHMARKS.items())
        print(_HELP.format(benchmarks="\n".join(lines)))
        return 0
    if name not in _BENCHMARKS:
        known = f"the benchmarks are {', '.join(_BENCHMARKS)}{suggestion(name, _BENCHMARKS)}"
        print(f"nsa bench: error: no benchmark {name!r}; {known}", file=sys.stderr)
        return 2
    words = sys.argv[3:] if name != "training" else _with_fit_settings(sys.argv[3:])
    paths = _PATHS & inspect.signature(_BENCHMARKS[name]).parameters.keys()
    return run_function(f"bench {name}", _BENCHMARKS[name], words, paths=paths)


def _with_fit_settings(words: list[str]) -> list[str]:
    """Flags of `nsa fit`, which are --config and those with a dot, and what follows them, as one setting `--fit`."""
    own: list[str] = []
    fit: list[str] = []
    target = own
    for word in words:
        if word.startswith("--"):
            flag = word.split("=")[0]
            target = fit if flag == "--config" or "." in flag else own
        target.append(word)
    return [*own, "--fit", json.dumps(fit)]
