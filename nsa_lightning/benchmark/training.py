"""`nsa bench training`: steps of `nsa fit` on random tokens, each case in processes of its own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.benchmark.cases import RESULTS_NAME, DocumentMix, check_choices, check_filled, check_output
from nsa_lightning.benchmark.results import write_whole

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_lightning.benchmark.training_report import TrainingRecord

PLOT_NAME = "training.png"
_CASE_MODULE = "nsa_cli.training_case"
_USER_MISTAKE = 2  # exit status


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of `nsa bench training`, as `bench_training` documents them.

    Raises:
        ValueError: a setting that cannot be measured, by its name, the rule and the value.
    """

    lengths: list[int]
    attention: list[str]
    devices: list[int]
    compile: list[bool]
    documents: str
    steps: int
    warmup_steps: int
    profile: bool
    time_limit: float
    output_dir: Path
    overwrite: bool
    fit: list[str]

    def __post_init__(self) -> None:
        check_types(self)
        check_choices("documents", [self.documents], get_args(DocumentMix))
        for name in ("lengths", "attention"):
            check_filled(name, getattr(self, name))
        for name in ("devices", "compile"):
            if getattr(self, name):
                check_filled(name, getattr(self, name))
        for name, values in (
            ("lengths", self.lengths), ("devices", self.devices), ("steps", [self.steps]),
            ("warmup_steps", [self.warmup_steps]),
        ):  # fmt: skip
            if values and min(values) < 1:
                raise SettingError(f"{name} must be at least 1, got {min(values)}")
        if not self.time_limit > 0:
            raise SettingError(f"time_limit must be seconds above 0, got {self.time_limit}")
        if not any(word.split("=")[0] == "--config" for word in self.fit):
            raise SettingError("config must name a config of nsa fit, got none. Set --config")
        check_output(self.output_dir, (RESULTS_NAME, PLOT_NAME), self.overwrite)


class TrainingCase(NamedTuple):
    """One run; None leaves a setting as the config has it."""

    tokens: int
    attention: str
    devices: int | None
    compile: bool | None

    @property
    def fit_words(self) -> list[str]:
        """The case as settings of `nsa fit`."""
        words = ["--data.seq_len", str(self.tokens)]
        words += ["--model.transformer.attention", json.dumps(self.attention.split(","))]
        words += ["--trainer.devices", str(self.devices), "--trainer.num_nodes", "1"] if self.devices else []
        return words + (["--model.compile", json.dumps(self.compile)] if self.compile is not None else [])

    @property
    def description(self) -> str:
        """The case in words."""
        words = [self.attention, f"{self.tokens} tokens"]
        words += [f"{self.devices} device{'' if self.devices == 1 else 's'}"] if self.devices else []
        return ", ".join(words + ([] if self.compile is None else ["compiled" if self.compile else "not compiled"]))


def bench_training(
    *,
    lengths: list[int] = [8192, 32768, 65536, 131072],  # noqa: B006 - read only; jsonargparse shows it
    attention: list[str] = ["nsa", "full"],  # noqa: B006
    devices: list[int] = [],  # noqa: B006
    compile: list[bool] = [],  # noqa: B006
    documents: str = "one",
    steps: int = 10,
    warmup_steps: int = 3,
    profile: bool = False,
    time_limit: float = 600.0,
    output_dir: Path = Path("runs/bench_training"),
    overwrite: bool = False,
    fit: list[str] = [],  # noqa: B006
) -> int:
    """Measure training steps of a config of `nsa fit`: tokens a second, MFU, peak memory, scaling over GPUs.

    Needs no data: the model, Trainer, strategy, precision, recompute and optimizer are the config's, the tokens are
    random and the same on every rank. --config is needed, and every other setting of nsa fit may follow, such as
    --trainer.strategy FSDP2Strategy --trainer.strategy.context_parallel_size 4. Each case runs in processes of its own;
    one that runs out of memory or fails is a row that says so. Prints a table and writes results.json (after every
    case) and training.png to output_dir.

    Args:
        lengths: tokens in a sequence (data.seq_len); data.batch_size sequences a step on each GPU, as in the config.
        attention: of the layers: nsa, full or sliding, or a pattern such as nsa,nsa,full.
        devices: GPUs; if none are given, trainer.devices. Several numbers measure weak scaling.
        compile: true, false or both; if not given, model.compile.
        documents: what a sequence is: one document, mixed ones from 128 to 16384 tokens, or equal_1k.
        steps: measured steps of the optimizer; their median counts.
        warmup_steps: steps before them, which compile and tune.
        profile: also profile two steps more, for the share of time in which a GPU runs NCCL's kernels alone.
        time_limit: seconds after which a case is given up.
        output_dir: where results.json and training.png are written, and the output of cases that failed.
        overwrite: replace results that are there.
        fit: settings of nsa fit; --config, and those with a dot in their name, need no --fit before them.

    Returns:
        The exit status, 1 if no case could be measured, else 0.

    Raises:
        ValueError: a setting that cannot be measured.
    """
    settings = TrainingSettings(
        lengths=lengths,
        attention=attention,
        devices=devices,
        compile=compile,
        documents=documents,
        steps=steps,
        warmup_steps=warmup_steps,
        profile=profile,
        time_limit=time_limit,
        output_dir=Path(output_dir),
        overwrite=overwrite,
        fit=fit,
    )
    return _run(settings)


def _run(settings: TrainingSettings) -> int:
    from nsa_lightning.benchmark.training_report import draw_training, training_table

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    for log in settings.output_dir.glob("case*.log"):  # of an earlier run
        log.unlink(missing_ok=True)
    results, plot = settings.output_dir / RESULTS_NAME, settings.output_dir / PLOT_NAME
    records: list[TrainingRecord] = []
    for record in _measure(settings):
        records.append(record)
        data = {
            "settings": asdict(settings) | {"output_dir": str(settings.output_dir)},
            "environment": next((record.step["environment"] for record in records if record.step), None),
            "records": [record.as_row(records) for record in records],
        }
        text = json.dumps(data, indent=1) + "\n"
        write_whole(results, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
    print(training_table(records))
    if all(record.step is None for record in records):
        print("nsa bench training: no case could be measured", file=sys.stderr)
        return 1
    write_whole(plot, lambda part: draw_training(records, part))
    print(f"\nwritten: {results}, {plot}")
    return 0


def _measure(settings: TrainingSettings) -> "Iterator[TrainingRecord]":
    from nsa_lightning.benchmark.training_report import TrainingRecord

    worlds: list[int | None] = [*settings.devices] or [None]
    compile: list[bool | None] = [*settings.compile] or [None]
    order = product(worlds, compile, settings.attention, settings.lengths)
    cases = [TrainingCase(tokens, attention, devices, compiled) for devices, compiled, attention, tokens in order]
    for index, case in enumerate(cases):
        print(f"nsa bench training: case {index + 1} of {len(cases)}: {case.description}", file=sys.stderr, flush=True)
        with TemporaryDirectory() as folder:
            result, log = Path(folder, RESULTS_NAME), Path(folder, "log")
            status = _launch([*case.fit_words, *_step_words(settings, result)], settings, log)
            if status == _USER_MISTAKE:
                mistake = log.read_text(errors="replace").rpartition("error: ")[2].strip()
                raise SettingError(f"{mistake} (case {case.description})")
            if result.exists():
                yield TrainingRecord(case=case, step=json.loads(result.read_text()))
            else:
                kept = settings.output_dir / f"case{index:02}.log"
                write_whole(kept, partial(copyfile, log))
                reason = _reason(status, Path(folder), log, settings.time_limit)
                yield TrainingRecord(case=case, reason=f"{reason}; see {kept}")


def _step_words(settings: TrainingSettings, result: Path) -> list[str]:
    """What `nsa_cli.training_case` wants to know beside the settings of `nsa fit`."""
    fields: dict[str, Any] = {
        "documents": settings.documents,
        "steps": settings.steps,
        "warmup_steps": settings.warmup_steps,
        "profile": json.dumps(settings.profile),
        "result": result,
    }
    return [str(word) for name, value in fields.items() for word in (f"--step.{name}", value)]


def _launch(words: list[str], settings: TrainingSettings, log: Path) -> int | None:
    """Run a case and all that it starts; the exit status, None if it took too long."""
    command = [sys.executable, "-m", _CASE_MODULE, "step", *settings.fit, *words]
    with log.open("wb") as output:
        process = subprocess.Popen(  # the case ends when nobody holds the other end of its input
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(settings.time_limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ranks that wait for one that has failed
            process.communicate()


def _reason(status: int | None, folder: Path, log: Path, time_limit: float) -> str:
    """Why there is no result: what a rank said, or the last line of the output."""
    said = sorted(path.read_text() for path in folder.glob("failure*"))
    memory = [text for text in said if "out of memory" in text]
    if status is None:
        return f"not done within {time_limit:g} s"
    lines = log.read_text(errors="replace").strip().splitlines()
    return (memory or said or [f"ended with status {status}: {lines[-1] if lines else 'no output'}"])[0]
