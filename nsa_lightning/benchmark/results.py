"""What a run of the benchmark measured, and how it is written."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from nsa_lightning.benchmark.cases import RESULTS_NAME, Shape

WHOLE, REST = "whole", "gates and rest"

Report = Callable[[str], None]
"""Is told something for the user, as soon as it is known."""


class Outcome(NamedTuple):
    """What a benchmark found."""

    text: str  # its tables
    written: tuple[Path, ...] = ()  # files
    failed: tuple[str, ...] = ()  # checks for which nothing was timed


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of inputs."""

    shape: Shape
    tokens: int
    documents: str
    lengths: list[int]
    inputs: str

    @property
    def description(self) -> str:
        """The case in words, without its number of tokens."""
        names = {"one": "one document", "mixed": "documents of 128 to 16384 tokens", "equal_1k": "documents of 1024"}
        return f"{self.shape.description}; {self.inputs} inputs; {names[self.documents]}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One measurement: a method on a case, whole or one stage of it."""

    case: Case
    method: str
    """`nsa`, or a rival: `flash` or `cudnn`."""
    stage: str = WHOLE
    """A stage of nsa, `joint backward`, `whole`, or `gates and rest`: the whole less its stages."""
    implementation: str | None = None
    """Of a stage: what the plan names; of the whole: the backend."""
    forward_ms: float | None = None
    forward_repetitions: int = 0
    backward_ms: float | None = None
    backward_repetitions: int = 0
    forward_floor_ms: float | None = None
    backward_floor_ms: float | None = None
    peak_gib: float | None = None
    unions: dict[int, float | None] = field(default_factory=dict)
    """Neighbouring queries -> mean distinct blocks that they select; None if no document is long enough."""
    reason: str | None = None
    """Why a time is missing."""

    def as_row(self) -> dict[str, Any]:
        """All fields in one flat object, for JSON."""
        case = asdict(self.case)
        lengths, shape = case.pop("lengths"), self.case.shape._asdict()
        shape["shape"] = shape.pop("name")
        own = {name: value for name, value in asdict(self).items() if name != "case"}
        return case | shape | {"num_documents": len(lengths), "longest_document": max(lengths)} | own


def ratio(value: float | None, base: float | None) -> float | None:
    """value / base where both are known."""
    return value / base if value is not None and base else None


def environment(device: str) -> dict[str, Any]:
    """The device and the versions that the numbers belong to."""
    import platform

    import torch

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "triton": triton_version,
        "python": platform.python_version(),
    }


class Row(Protocol):
    """A measurement."""

    def as_row(self) -> dict[str, Any]:
        """All fields in one flat object, for JSON."""


_Row = TypeVar("_Row", bound=Row)


def write_results(
    path: Path, settings: dict[str, Any], run: dict[str, Any], checks: Sequence[Any], records: Sequence[Row]
) -> None:
    """Write everything as JSON: `run` (settings, device, versions, rates), `checks` and flat `records`."""
    data = {
        "run": {"settings": settings} | run,
        "checks": [check._asdict() | {"passed": check.passed} for check in checks],
        "records": [record.as_row() for record in records],
    }
    text = json.dumps(data, indent=1, default=str) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def measure_and_write(
    settings: dict[str, Any],
    plot_name: str,
    run: dict[str, Any],
    checks: Sequence[Any],
    measured: Iterable[list[_Row]],
    draw: Callable[[list[_Row], str, Path], object],
    tables: Callable[[list[_Row]], str],
) -> Outcome:
    """Take one case after another, write all results so far after each, and in the end draw them.

    Args:
        settings: of the run, output_dir and dtype among them.
        plot_name: file in output_dir beside results.json.
        run: `environment` and rates of the device.
        checks: verdicts that come before.
        measured: the records of each case.
        draw: draws records under a title to a file.
        tables: records in words.
    """
    results, plot = settings["output_dir"] / RESULTS_NAME, settings["output_dir"] / plot_name
    records: list[_Row] = []
    for new in measured:
        records += new
        write_results(results, settings, run, checks, records)
    title = f"{run['environment']['device']}, {settings['dtype']}, torch {run['environment']['torch']}"
    write_whole(plot, lambda part: draw(records, title, part))
    return Outcome(tables(records), (results, plot))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place: no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
