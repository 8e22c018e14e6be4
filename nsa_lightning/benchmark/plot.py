"""Time against tokens, both axes logarithmic: NSA and its rivals, a row of panels for each shape and document mix."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_lightning.benchmark.results import WHOLE, Record

_COLOURS = {"nsa": "#0b6e4f", "flash": "#c8553d", "cudnn": "#5b5f97"}
_NAMES = {"nsa": "NSA", "flash": "full, flash", "cudnn": "full, cuDNN"}
_LINES = {"random": "--", "overlap": "-"}
_LABEL_GAP = 0.055
"""Least distance between two labels, as a share of the panel's height."""


def draw_times(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw the whole-operator times.

    Args:
        records: all measurements; stages are left out.
        title: heading.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    wholes = [record for record in records if record.stage == WHOLE]
    rows = list(dict.fromkeys((record.case.shape, record.case.documents) for record in wholes))
    figure = Figure(figsize=(12, 0.8 + 4.2 * len(rows)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for (shape, documents), pair in zip(rows, panels, strict=True):
        chosen = [record for record in wholes if (record.case.shape, record.case.documents) == (shape, documents)]
        for panel, direction in zip(pair, ("forward", "backward"), strict=True):
            _draw_panel(panel, _lines(chosen, direction))
            panel.set_title(f"{shape.description}; documents: {documents}; {direction}", fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _lines(records: Sequence[Record], direction: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(method, inputs) -> (tokens, ms) in order of tokens; a rival has one line, whatever its inputs."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for record in records:
        ms = record.forward_ms if direction == "forward" else record.backward_ms
        if ms is not None:
            inputs = record.case.inputs if record.method == "nsa" else ""
            lines.setdefault((record.method, inputs), []).append((record.case.tokens, ms))
    return {name: sorted(points) for name, points in lines.items()}


def _draw_panel(panel: Any, lines: dict[tuple[str, str], list[tuple[int, float]]]) -> None:
    if not lines:
        write_not_measured(panel)
        return
    for (method, inputs), points in lines.items():
        tokens, milliseconds = zip(*points, strict=True)
        panel.plot(tokens, milliseconds, _LINES.get(inputs, "-"), marker="o", ms=4, color=_COLOURS[method])
    points = [point for some in lines.values() for point in some]
    set_axes(panel, points)
    ticks = sorted(tokens for tokens, _ in points)
    panel.set_xlim(ticks[0] / 1.15, ticks[-1] * max(1.8, (ticks[-1] / ticks[0]) ** 0.35))
    _label_ends(panel, {name: points[-1] for name, points in lines.items()})


def write_not_measured(panel: Any) -> None:
    """Say that there is nothing to draw."""
    panel.text(0.5, 0.5, "not measured", ha="center", transform=panel.transAxes)
    panel.set_axis_off()


def set_axes(panel: Any, points: Sequence[tuple[int, float]]) -> None:
    """Logarithmic axes of tokens and milliseconds around all points (tokens, ms)."""
    from matplotlib.ticker import LogLocator, NullLocator

    ticks, times = sorted({tokens for tokens, _ in points}), [ms for _, ms in points]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_ylim(min(times) / 1.6, max(times) * 1.8)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.set_xticks(ticks, [f"{tick // 1024}K" if tick % 1024 == 0 else str(tick) for tick in ticks], minor=False)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.3)
    panel.set_xlabel("tokens")
    panel.set_ylabel("ms")


def _label_ends(panel: Any, ends: dict[tuple[str, str], tuple[int, float]]) -> None:
    """Name each line at its right end, moved up where labels would overlap."""
    low, high = map(math.log, panel.get_ylim())
    below = -math.inf
    for (method, inputs), (tokens, ms) in sorted(ends.items(), key=lambda item: item[1][1]):
        height = max((math.log(ms) - low) / (high - low), below + _LABEL_GAP)
        below = height
        panel.annotate(
            f"{_NAMES[method]}, {inputs} inputs" if inputs else _NAMES[method],
            (tokens, math.exp(low + height * (high - low))),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            fontsize=8,
            color=_COLOURS[method],
        )
