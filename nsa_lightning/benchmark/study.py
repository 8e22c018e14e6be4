"""`nsa bench study`: runs of `nsa fit` on the same data, at equal tokens and at equal time."""

import bisect
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError

from nsa_lightning.benchmark.results import Outcome, write_results, write_whole

Curve = list[tuple[float, float]]
"""Points (tokens in millions or hours, nats), in order of the first."""

_COPIED = 0.5
"""A length counts as copied where the loss of its repetition is below this share of the first validation's."""

_POSITIONS = "val/loss_by_position/"
_COPYING = "val/copying/"
_SEED = re.compile(r"[-_]s?\d+$")
"""What the names of runs that differ in their seed alone end with, such as `-0` or `-s0`."""
_COLOURS = ("#0b6e4f", "#5b5f97", "#c8553d", "#d69f3a", "#3a86a8", "#8d5a97", "#555555")


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """What one run logged, its validations in order of their steps."""

    name: str
    """The run's directory below the study's."""

    steps: list[int]
    """Optimizer steps before each validation."""

    hours: list[float]
    """Time of each validation since the first training loss was logged, hours."""

    tokens_per_step: int
    """Tokens of an optimizer step, padding included."""

    values: dict[str, list[float]]
    """By tag: `val/loss` and whatever else was logged with each validation."""

    def tokens(self, index: int) -> float:
        """Tokens before a validation, millions."""
        return self.steps[index] * self.tokens_per_step / 1e6

    def last(self, tag: str) -> float | None:
        """The value of the last validation; None where it was not logged."""
        return self.values[tag][-1] if tag in self.values else None

    def starts(self, prefix: str) -> list[int]:
        """The numbers behind a tag's prefix, ascending."""
        return sorted(int(tag.removeprefix(prefix)) for tag in self.values if tag.startswith(prefix))

    def copied_after(self, length: int) -> float | None:
        """Millions of tokens until repetitions from `length` tokens back are told; None where they never were."""
        losses = self.values[f"{_COPYING}{length}"]
        found = next((index for index, loss in enumerate(losses) if loss < _COPIED * losses[0]), None)
        return None if found is None else self.tokens(found)

    def as_row(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "name": self.name, "steps": self.steps, "hours": self.hours, "tokens_per_step": self.tokens_per_step,
            "values": self.values,
        }  # fmt: skip


def bench_study(runs_dir: str, output_dir: str | None, by_time: bool = True) -> Outcome:
    """Lay the runs of a study side by side; writes study.json and study.png. Arguments as `nsa bench study` has them.

    Raises:
        ValueError: there is no run with a validation.
    """
    root = Path(runs_dir).expanduser()
    runs = [run for run in map(read_run, sorted(root.glob("*/version_*/.."))) if run is not None]
    runs = list({run.name: run for run in runs}.values())
    if not runs:
        raise SettingError(f"runs_dir must hold runs of nsa fit that validated, {runs_dir} holds none")
    target = root if output_dir is None else Path(output_dir).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    write_results(target / "study.json", {"runs_dir": runs_dir}, {}, [], runs)
    write_whole(target / "study.png", lambda part: draw_study(runs, part, by_time))
    return Outcome(study_table(runs, by_time), (target / "study.json", target / "study.png"))


def read_run(directory: Path) -> StudyRun | None:
    """What the newest version of a run logged; None where nothing was validated.

    Args:
        directory: the run's, with `version_*` in it.
    """
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    version = max(directory.resolve().glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    if not (version / "config.yaml").is_file():
        return None
    events = EventAccumulator(str(version), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("val/")]
    if "val/loss" not in tags or "train/loss" not in events.Tags()["scalars"]:
        return None
    start = events.Scalars("train/loss")[0].wall_time
    validations = events.Scalars("val/loss")
    settings = yaml.safe_load((version / "config.yaml").read_text())
    data, trainer = settings["data"], settings["trainer"]
    tokens = data["seq_len"] * data["batch_size"] * (trainer.get("accumulate_grad_batches") or 1)
    return StudyRun(
        name=directory.resolve().name,
        steps=[point.step + 1 for point in validations],
        hours=[(point.wall_time - start) / 3600 for point in validations],
        tokens_per_step=tokens,
        values={tag: [point.value for point in events.Scalars(tag)] for tag in tags},
    )


def at(curve: Curve, x: float) -> float | None:
    """The value between a curve's points, on a line between the two beside it; None outside of them."""
    place = bisect.bisect_left(curve, (x, -math.inf))
    if place == len(curve) or (place == 0 and curve[0][0] > x):
        return None
    if curve[place][0] == x:
        return curve[place][1]
    (x0, y0), (x1, y1) = curve[place - 1 : place + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def study_table(runs: Sequence[StudyRun], by_time: bool = True) -> str:
    """A row a run: losses after as many tokens and after as much time as all runs have, by position, and copying.

    Args:
        runs: the rows.
        by_time: with hours, and losses at equal time.
    """
    from nsa_lightning.text_table import number, text_table

    tokens = min(run.tokens(-1) for run in runs)
    hours = min(run.hours[-1] for run in runs)
    positions = sorted({start for run in runs for start in run.starts(_POSITIONS)})
    lengths = sorted({length for run in runs for length in run.starts(_COPYING)})
    header = ["run", "M tokens", *(["hours"] if by_time else []), "val/loss", f"at {tokens:.0f} M"]
    header += [f"at {hours:.2f} h"] if by_time else []
    header += [f"from {start}" for start in positions] + [f"copies {length} after M" for length in lengths]
    rows = []
    for run in runs:
        losses = run.values["val/loss"]
        by_tokens: Curve = [(run.tokens(index), loss) for index, loss in enumerate(losses)]
        row = [run.name, number(run.tokens(-1)), *([number(run.hours[-1])] if by_time else []), _nats(losses[-1])]
        row += [_nats(at(by_tokens, tokens))]
        row += [_nats(at(list(zip(run.hours, losses, strict=True)), hours))] if by_time else []
        row += [_nats(run.last(f"{_POSITIONS}{start}")) for start in positions]
        row += [number(run.copied_after(length)) if f"{_COPYING}{length}" in run.values else "-" for length in lengths]
        rows.append(row)
    return text_table(header, rows)


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def draw_study(runs: Sequence[StudyRun], path: Path, by_time: bool = True) -> None:
    """Loss against tokens and against time, loss by position, and copying against tokens.

    Copying is that of the longest pieces that some run copied, or of the shortest where none did.

    Args:
        runs: what is drawn; those whose names differ in a seed's number alone share a colour.
        path: the PNG to write.
        by_time: with the panel of losses against time.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8) if by_time else (15, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 2).flat) if by_time else list(figure.subplots(1, 3))
    by_tokens, by_position, copying = panels[0], panels[-2], panels[-1]
    length = _length_to_draw(runs)
    arms = list(dict.fromkeys(_SEED.sub("", run.name) for run in runs))
    for run in runs:
        arm = _SEED.sub("", run.name)
        seeds = [other.name for other in runs if _SEED.sub("", other.name) == arm]
        dashes = ("-", "--", ":", "-.")[seeds.index(run.name) % 4]
        style = {
            "color": _COLOURS[arms.index(arm) % len(_COLOURS)],
            "ls": dashes,
            "label": run.name,
            "marker": "o",
            "ms": 3,
        }
        tokens, losses = [run.tokens(index) for index in range(len(run.steps))], run.values["val/loss"]
        by_tokens.plot(tokens, losses, **style)
        if by_time:
            panels[1].plot(run.hours, losses, **style)
        starts = run.starts(_POSITIONS)
        by_position.plot(range(len(starts)), [run.values[f"{_POSITIONS}{start}"][-1] for start in starts], **style)
        by_position.set_xticks(range(len(starts)), [str(start) for start in starts])
        if f"{_COPYING}{length}" in run.values:
            copying.plot(tokens, run.values[f"{_COPYING}{length}"], **style)
    titles = [
        ("validation loss", "million tokens"),
        *([("validation loss", "hours")] if by_time else []),
        ("validation loss by position, at the end", "position in the document, from"),
        (f"random tokens repeated from {length} back" if length else "copying", "million tokens"),
    ]
    for panel, (title, label) in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(label)
        panel.set_ylabel("nats a token")
        panel.grid(alpha=0.3)
    by_tokens.legend(fontsize=8)
    figure.savefig(path, format="png")


def _length_to_draw(runs: Sequence[StudyRun]) -> int | None:
    """The longest pieces that some run copied, or the shortest; None where copying was not logged."""
    lengths = sorted({length for run in runs for length in run.starts(_COPYING)})
    copied = [
        length
        for length in lengths
        if any(f"{_COPYING}{length}" in run.values and run.copied_after(length) is not None for run in runs)
    ]
    found = copied or lengths[:1]
    return found[-1] if found else None
