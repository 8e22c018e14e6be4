"""Pictures of a run: where needles were found, quality by length, and quality by what it costs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_lightning.data.storage import whole_file
from nsa_lightning.evaluation.summary import Row, Summary

_COLOURS = ("#0b6e4f", "#c8553d", "#5b5f97", "#d4a017", "#3a7ca5", "#8d5a97", "#6b705c", "#e07a5f")
_PANELS = {"score": "score", "log_probability": "nats a token", "loss": "nats a token"}


def draw_all(summary: Summary, directory: Path) -> list[Path]:
    """Draw what the run's results allow; returns the files."""
    paths = []
    for task in dict.fromkeys(row.task for row in summary.rows if row.depth is not None):
        rows = [row for row in summary.rows if row.task == task]
        paths.append(directory / f"{task}.png")
        save_figure(paths[-1], heat_map(rows, f"{task}: share of the values found"))
    if any(row.length is not None for row in summary.rows):
        paths.append(directory / "quality_by_length.png")
        save_figure(paths[-1], _quality_by_length(summary))
    if any(cost.decode_rate for cost in summary.costs if cost.length is not None):
        paths.append(directory / "quality_by_cost.png")
        save_figure(paths[-1], _quality_by_cost(summary))
    return paths


def heat_map(rows: Sequence[Row], title: str) -> Any:
    """A panel for each method: the score by length and depth, below it the log-probability where it was measured."""
    methods = list(dict.fromkeys(row.method for row in rows))
    lengths = sorted({row.length for row in rows if row.length is not None})
    depths = sorted({row.depth for row in rows if row.depth is not None})
    kinds = [kind for kind in ("score", "log_probability") if any(kind in row.scores for row in rows)]
    width, height = 1.6 + 0.62 * len(lengths), 1.3 + 0.45 * len(depths)
    figure = new_figure(width * len(methods) + 1.4, height * len(kinds) + 0.5)
    panels = figure.subplots(len(kinds), len(methods), squeeze=False)
    for kind, line in zip(kinds, panels, strict=True):
        tables = [_table([row for row in rows if row.method == method], kind, lengths, depths) for method in methods]
        low = 0.0 if kind == "score" else float(np.nanmin(tables))
        high = 1.0 if kind == "score" else 0.0
        for method, table, panel in zip(methods, tables, line, strict=True):
            image = panel.imshow(
                table, vmin=low, vmax=high, cmap="RdYlGn" if kind == "score" else "viridis", aspect="auto"
            )
            panel.set_title(method, fontsize=10)
            panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths])
            panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            panel.set_xlabel("tokens")
            _write_values(panel, table, low, high, kind)
        line[0].set_ylabel("depth")
        label = "score" if kind == "score" else "log-probability,\nnats a token"
        figure.colorbar(image, ax=list(line), label=label, fraction=0.05)
    figure.suptitle(title, fontsize=11)
    return figure


def as_pixels(figure: Any) -> NDArray[np.uint8]:
    """A figure as an image, uint8 [height, width, 3]."""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()


def _quality_by_length(summary: Summary) -> Any:
    """A row of panels for each task, one for each kind of score that it has; in them a line for each method."""
    rows = [row for row in summary.rows if row.length is not None]
    tasks = {
        task: [kind for kind in _PANELS if any(row.task == task and kind in row.scores for row in rows)]
        for task in dict.fromkeys(row.task for row in rows)
    }
    columns = max(map(len, tasks.values()))
    figure = new_figure(4.6 * columns + 0.6, 2.9 * len(tasks) + 0.4)
    grid = figure.subplots(len(tasks), columns, squeeze=False)
    for (task, kinds), line in zip(tasks.items(), grid, strict=True):
        lengths = sorted({row.length for row in rows if row.task == task and row.length is not None})
        for kind, panel in zip(kinds, line, strict=False):
            _draw_lines(panel, summary, task, kind, lengths)
        for panel in line[len(kinds) :]:
            panel.set_axis_off()
    grid[0, 0].legend(fontsize=8)
    return figure


def _draw_lines(panel: Any, summary: Summary, task: str, kind: str, lengths: Sequence[int]) -> None:
    """One kind of score of one task by length."""
    for method, colour in zip(summary.methods, _COLOURS * len(summary.methods), strict=False):
        points = [(length, summary.mean(method, task, kind, length)) for length in lengths]
        known = [(length, mean) for length, mean in points if mean is not None]
        if known:
            panel.plot(*zip(*known, strict=True), color=colour, marker="o", ms=4, label=method)
    panel.set_title(task if kind != "log_probability" else f"{task}: log-probability of the answer", fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [_short(length) for length in lengths])
    panel.minorticks_off()
    panel.set_xlabel("tokens")
    panel.set_ylabel(_PANELS[kind])
    if kind == "score":
        panel.set_ylim(-0.04, 1.04)
    panel.grid(alpha=0.3)


def _quality_by_cost(summary: Summary) -> Any:
    """The mean score of each method and length, by the time of a decoded token and by the memory of the cache."""
    from matplotlib.ticker import LogLocator, NullLocator

    figure = new_figure(9.6, 4.0)
    costs = [cost for cost in summary.costs if cost.length is not None and cost.decode_rate]
    ways = (
        ("decoding, ms a token of a sequence", lambda cost: 1e3 / cost.decode_rate),
        ("cache of a sequence, MB", lambda cost: cost.cache_bytes / 1e6),
    )
    for panel, (label, place) in zip(figure.subplots(1, 2, sharey=True), ways, strict=True):
        for method, colour in zip(summary.methods, _COLOURS * len(summary.methods), strict=False):
            own = [cost for cost in costs if cost.method == method]
            lengths = sorted({cost.length for cost in own if cost.length is not None})
            points = []
            for length in lengths:
                here = [cost for cost in own if cost.length == length]
                means = [summary.mean(method, cost.task, length=length) for cost in here]
                known = [mean for mean in means if mean is not None]
                if known:
                    points.append((sum(map(place, here)) / len(here), sum(known) / len(known), length))
            if points:
                x, y, names = zip(*points, strict=True)
                panel.plot(x, y, color=colour, marker="o", ms=5, lw=0.8, label=method)
                for at, score, length in zip(x, y, names, strict=True):
                    panel.annotate(
                        _short(length), (at, score), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour
                    )
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean score over tasks")
    figure.axes[0].set_ylim(-0.04, 1.08)
    figure.axes[0].legend(fontsize=8)
    return figure


def _table(rows: Sequence[Row], kind: str, lengths: Sequence[int], depths: Sequence[float]) -> NDArray[np.float64]:
    """Scores by depth and length, NaN where there is none."""
    table = np.full((len(depths), len(lengths)), np.nan)
    for row in rows:
        if row.length is not None and row.depth is not None and kind in row.scores:
            table[depths.index(row.depth), lengths.index(row.length)] = row.scores[kind]
    return table


def _write_values(panel: Any, table: NDArray[np.float64], low: float, high: float, kind: str) -> None:
    for row, column in np.ndindex(table.shape):
        value = table[row, column]
        if np.isnan(value):
            continue
        share = (value - low) / ((high - low) or 1.0)
        dark = share < 0.5 if kind != "score" else not 0.2 < share < 0.85
        panel.text(
            column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black"
        )


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that size in inches, which no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(path: Path, figure: Any) -> None:
    """Write a PNG, whole or not at all."""
    with whole_file(path) as stream:
        figure.savefig(stream, format="png")


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
