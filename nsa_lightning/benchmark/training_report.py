"""The table and the plot of `nsa bench training`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_lightning.benchmark.results import ratio
from nsa_lightning.benchmark.training_cases import TrainingCase
from nsa_lightning.text_table import number, text_table

_COLOURS = {"nsa": "#0b6e4f", "full": "#c8553d"}
_OTHER_COLOUR = "#5b5f97"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """One case and what came of it."""

    case: TrainingCase
    step: dict[str, Any] | None = None
    """A `training_step.StepMeasurement`."""
    reason: str | None = None
    """Why there is none."""

    def measured(self, name: str) -> float | None:
        """A field of the measurement; None where there is none."""
        return self.step[name] if self.step else None

    @property
    def world_size(self) -> int | None:
        """GPUs, where they are known."""
        return self.step["world_size"] if self.step else self.case.devices

    @property
    def ranks_a_batch(self) -> int | None:
        """GPUs that share each batch, where several do."""
        return self.step["ranks_a_batch"] if self.step and self.step["ranks_a_batch"] > 1 else None

    @property
    def tokens_per_second(self) -> float | None:
        """Of all GPUs."""
        return ratio(self.measured("tokens"), ratio(self.measured("step_ms"), 1e3))

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        """What scaling is judged by."""
        return ratio(self.tokens_per_second, self.world_size)

    def efficiency(self, records: "Sequence[TrainingRecord]") -> float | None:
        """Tokens a second a GPU beside those of the fewest GPUs, which did the same work each."""
        alike = [other for other in records if self.case._replace(devices=None) == other.case._replace(devices=None)]
        least = min((other for other in alike if other.step), key=lambda other: other.world_size or 0, default=None)
        return ratio(self.tokens_per_second_per_gpu, least.tokens_per_second_per_gpu) if least else None

    def against_full(self, records: "Sequence[TrainingRecord]") -> float | None:
        """How many times as fast as the same model with full attention."""
        like = self.case._replace(attention="full")
        full = next((other for other in records if other.case == like != self.case), None)
        return ratio(self.tokens_per_second, full.tokens_per_second) if full is not None else None

    def as_row(self, records: "Sequence[TrainingRecord]") -> dict[str, Any]:
        """Everything in one flat object, for JSON; compared with the records so far."""
        row = self.case._asdict()
        row["seq_len"] = row.pop("tokens")
        step = {name: value for name, value in (self.step or {}).items() if name != "environment"}
        return row | step | {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "efficiency": self.efficiency(records),
            "against_full": self.against_full(records),
            "reason": self.reason,
        }  # fmt: skip


def training_table(records: Sequence[TrainingRecord]) -> str:
    """One row a case; columns in which nothing was measured are left out."""
    columns = {
        "attention, tokens": [f"{record.case.attention}, {record.case.tokens}" for record in records],
        "compile": [_word(record.case.compile) for record in records],
        "GPUs": [_word(record.world_size) for record in records],
        "a batch": [_word(record.ranks_a_batch) for record in records],
        "step ms": [number(record.measured("step_ms")) for record in records],
        "tokens/s": [_thousands(record.tokens_per_second) for record in records],
        "tokens/s/GPU": [_thousands(record.tokens_per_second_per_gpu) for record in records],
        "MFU": [_percent(record.measured("mfu")) for record in records],
        "peak GB": [number(ratio(record.measured("peak_bytes"), 1e9)) for record in records],
        "vs full": [number(record.against_full(records), "x") for record in records],
        "efficiency": [_percent(record.efficiency(records)) for record in records],
        "NCCL alone": [_percent(record.measured("nccl_alone")) for record in records],
    }
    if len({record.world_size for record in records if record.step}) < 2:
        del columns["efficiency"]
    columns = {title: cells for title, cells in columns.items() if any(cell != "-" for cell in cells)}
    table = text_table(list(columns), zip(*columns.values(), strict=True))
    devices = dict.fromkeys(record.step["environment"]["device"] for record in records if record.step)
    failed = [f"- {record.case.description}: {record.reason}" for record in records if record.reason]
    return "\n\n".join(part for part in (", ".join(devices), table, "\n".join(failed)) if part)


def _word(value: object) -> str:
    return "-" if value is None else str(value).lower()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def draw_training(records: Sequence[TrainingRecord], path: Path) -> None:
    """Tokens a second a GPU against length, and efficiency against GPUs where there are several numbers of them.

    Args:
        records: all cases; those without a result are left out.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    measured = [record for record in records if record.step is not None]
    scales = len({record.world_size for record in measured}) > 1
    figure = Figure(figsize=(12 if scales else 6.4, 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 1 + scales, squeeze=False)[0]
    speeds, efficiencies = _Lines(), _Lines()
    for record in measured:
        gpus = f"{record.world_size} GPU{'' if record.world_size == 1 else 's'}"
        speeds.add(record, gpus, record.case.tokens, record.tokens_per_second_per_gpu)
        efficiencies.add(record, f"{record.case.tokens} tokens", record.world_size, record.efficiency(measured))
    _draw(panels[0], speeds, "tokens in a sequence", "tokens/s/GPU")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[0].yaxis.set_minor_locator(NullLocator())
    if scales:
        _draw(panels[1], efficiencies, "GPUs", "tokens/s/GPU beside the fewest GPUs'")
        panels[1].set_ylim(bottom=0)
    figure.savefig(path, format="png")


class _Lines(dict[tuple[str, bool | None, str], list[tuple[int, float]]]):
    """(attention, compile, variant) -> (x, y) in order of x."""

    def add(self, record: TrainingRecord, variant: str, x: int | None, y: float | None) -> None:
        """Add a point; one without a number is left out."""
        if x is not None and y is not None:
            points = self.setdefault((record.case.attention, record.case.compile, variant), [])
            points.append((x, y))
            points.sort()


def _draw(panel: Any, lines: _Lines, x_label: str, y_label: str) -> None:
    from matplotlib.ticker import NullLocator

    variants = list(dict.fromkeys(variant for _, _, variant in lines))
    for (attention, compile, variant), points in lines.items():
        words = [attention, *([] if compile is None else ["compiled" if compile else "not compiled"]), variant]
        style = "--" if compile is False else "-"
        colour, marker = _COLOURS.get(attention, _OTHER_COLOUR), "osd^v*"[variants.index(variant) % 6]
        panel.plot(*zip(*points, strict=True), style, marker=marker, ms=5, color=colour, label=", ".join(words))
    panel.set_xscale("log", base=2)
    ticks = sorted({x for points in lines.values() for x, _ in points})
    panel.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else str(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3, which="both")
    panel.set_xlabel(x_label)
    panel.set_ylabel(y_label)
    panel.legend(fontsize=8)
