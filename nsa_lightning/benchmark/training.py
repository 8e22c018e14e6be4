"""`nsa bench training`: steps of `nsa fit` on random tokens, each case in processes of its own."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nsa_kernels.errors import SettingError

from nsa_lightning.benchmark.cases import RESULTS_NAME
from nsa_lightning.benchmark.results import Outcome, Report, write_whole
from nsa_lightning.benchmark.training_cases import PLOT_NAME, TrainingSettings

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_lightning.benchmark.training_report import TrainingRecord

_USER_MISTAKE = 2  # exit status


def bench_training(settings: TrainingSettings, command: Sequence[str], progress: Report) -> Outcome:
    """Measure training steps of a config of `nsa fit`, and write what was found, results after every case.

    Args:
        settings: what is measured.
        command: runs one case; followed by settings of `nsa fit` and of `training_step.StepSettings`.
        progress: is told what is done next.

    Returns:
        A table, and the files; without those where no case could be measured.

    Raises:
        ValueError: a setting that `nsa fit` does not take.
    """
    from nsa_lightning.benchmark.training_report import draw_training, training_table

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    for log in settings.output_dir.glob("case*.log"):  # of an earlier run
        log.unlink(missing_ok=True)
    results, plot = settings.output_dir / RESULTS_NAME, settings.output_dir / PLOT_NAME
    records: list[TrainingRecord] = []
    for record in _measure(settings, command, progress):
        records.append(record)
        data = {
            "settings": asdict(settings) | {"output_dir": str(settings.output_dir)},
            "environment": next((record.step["environment"] for record in records if record.step), None),
            "records": [record.as_row(records) for record in records],
        }
        text = json.dumps(data, indent=1) + "\n"
        write_whole(results, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
    if all(record.step is None for record in records):
        return Outcome(training_table(records))
    write_whole(plot, lambda part: draw_training(records, part))
    return Outcome(training_table(records), (results, plot))


def _measure(settings: TrainingSettings, command: Sequence[str], progress: Report) -> "Iterator[TrainingRecord]":
    from nsa_lightning.benchmark.training_report import TrainingRecord

    cases = list(settings.cases())
    for index, case in enumerate(cases):
        progress(f"case {index + 1} of {len(cases)}: {case.description}")
        with TemporaryDirectory() as folder:
            result, log = Path(folder, RESULTS_NAME), Path(folder, "log")
            words = [*settings.fit, *case.fit_words, *_step_words(settings, result)]
            status = _launch([*command, *words], settings.time_limit, log)
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
    """The settings of `training_step.StepSettings`, which the command takes beside those of `nsa fit`."""
    fields: dict[str, Any] = {
        "documents": settings.documents,
        "steps": settings.steps,
        "warmup_steps": settings.warmup_steps,
        "profile": json.dumps(settings.profile),
        "result": result,
    }
    return [str(word) for name, value in fields.items() for word in (f"--step.{name}", value)]


def _launch(command: Sequence[str], time_limit: float, log: Path) -> int | None:
    """Run a case and all that it starts; the exit status, None if it took too long."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # the case ends when nobody holds the other end of its input
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
        )
        try:
            return process.wait(time_limit)
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
