"""`nsa bench WHAT`: finds the measurement, runs it and prints what it found."""

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from nsa_cli.function_command import run_function
from nsa_cli.parser import suggestion
from nsa_lightning.benchmark.cases import KernelSettings
from nsa_lightning.benchmark.decode import DecodeSettings, bench_decode
from nsa_lightning.benchmark.kernels import bench_kernels
from nsa_lightning.benchmark.loader import LoaderSettings, bench_loader
from nsa_lightning.benchmark.results import Outcome
from nsa_lightning.benchmark.study import bench_study
from nsa_lightning.benchmark.training import bench_training
from nsa_lightning.benchmark.training_cases import TrainingSettings

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

_PATHS = ("config", "output_dir", "prepared")
_CASE_COMMAND = (sys.executable, "-m", "nsa_cli.training_case", "step")
"""Runs one case of `nsa bench training`."""


def kernels(**settings: Any) -> int:
    """Check each stage against the eager backend in float32, then time NSA beside PyTorch's full attention.

    Everything is timed in one run: the operator (q, k, v, gates to output, compression and the choice of blocks
    included), its stages, and full causal attention through PyTorch's flash and cuDNN kernels; forward and backward.
    Prints tables and writes results.json (after every case) and kernels.png to output_dir. Block sizes are the
    defaults of NSAConfig.

    Args:
        settings: of the measurement.

    Returns:
        The exit status: 1 if a check failed, else 0.
    """
    return _tell("kernels", bench_kernels(KernelSettings(**settings), _report, partial(_progress, "kernels")))


def decode(**settings: Any) -> int:
    """Check the kernels of a step in float32, then time one new token of each sequence, NSA beside full attention.

    Everything is timed in one run, launched by Python and in CUDA graphs: one attention layer by decode_attention,
    with sliding keys of its own and shared ones, and full attention through our own kernels and PyTorch's flash and
    cuDNN ones; with --config also the whole model and its prefill, its attention as configured and full. Prints tables
    and writes results.json (after every case) and decode.png to output_dir. The layers' block sizes are the defaults
    of NSAConfig. What the device has no memory for is a row that says so.

    Args:
        settings: of the measurement.

    Returns:
        The exit status: 1 if a check failed, else 0.
    """
    return _tell("decode", bench_decode(DecodeSettings(**settings), _report, partial(_progress, "decode")))


def loader(**settings: Any) -> int:
    """Pack the training split of a prepared set and time its batches, as `nsa fit` gets them.

    Prints a table: sequences, share of padding, documents that are cut, seconds until the sequences are planned and
    from there to the first batch, tokens a second after it, and the memory that the largest worker has for itself.

    Args:
        settings: of the measurement.

    Returns:
        The exit status, 0.
    """
    print(bench_loader(LoaderSettings(**settings), partial(_progress, "loader")))
    return 0


def training(**settings: Any) -> int:
    """Measure training steps of a config of `nsa fit`: tokens a second, MFU, peak memory, scaling over GPUs.

    Needs no data: the model, Trainer, strategy, precision, recompute and optimizer are the config's, the tokens are
    random and the same on every rank. --config is needed, and every other setting of nsa fit may follow, such as
    --trainer.strategy FSDP2Strategy --trainer.strategy.context_parallel_size 4. Each case runs in processes of its own;
    one that runs out of memory or fails is a row that says so. Prints a table and writes results.json (after every
    case) and training.png to output_dir.

    Args:
        settings: of the measurement.

    Returns:
        The exit status, 1 if no case could be measured, else 0.
    """
    outcome = bench_training(TrainingSettings(**settings), _CASE_COMMAND, partial(_progress, "training"))
    if outcome.written:
        return _tell("training", outcome)
    print(outcome.text)
    _progress("training", "no case could be measured")
    return 1


def study(runs_dir: str = "runs/study", output_dir: str | None = None, by_time: bool = True) -> int:
    """Lay runs on the same data side by side: losses, loss by position, copying, at equal tokens and at equal time.

    Reads what `nsa fit` logged to TensorBoard. Every directory in `runs_dir` is a run, its newest version counts.
    Prints a table and writes study.json and study.png.

    Args:
        runs_dir: directory with a directory of `nsa fit` for each run, as trainer.logger's save_dir.
        output_dir: where results are written; `runs_dir` if not given.
        by_time: compare at equal time too; false for runs that shared a device, whose times say nothing.

    Returns:
        The exit status, 0.
    """
    return _tell("study", bench_study(runs_dir, output_dir, by_time))


_BENCHMARKS: dict[str, Callable[..., int]] = {
    "kernels": kernels,
    "decode": decode,
    "loader": loader,
    "training": training,
    "study": study,
}


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
    return run_function(f"bench {name}", _BENCHMARKS[name], words, paths=_PATHS)


def _report(text: str) -> None:
    print(text, flush=True)


def _progress(name: str, text: str) -> None:
    print(f"nsa bench {name}: {text}", file=sys.stderr, flush=True)


def _tell(name: str, outcome: Outcome) -> int:
    """Print what was found; returns the exit status."""
    if outcome.failed:
        _progress(name, f"nothing was timed, these checks failed: {', '.join(outcome.failed)}")
        return 1
    print(f"{outcome.text}\n\nwritten: {', '.join(map(str, outcome.written))}")
    return 0


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
