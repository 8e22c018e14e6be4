"""The tables and the plot of `nsa bench decode`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nsa_lightning.benchmark.decode_records import DecodeCase, DecodeRecord
from nsa_lightning.benchmark.plot import set_axes, write_not_measured
from nsa_lightning.benchmark.results import ratio
from nsa_lightning.benchmark.timing import Ceilings
from nsa_lightning.text_table import number, text_table

_COLOURS = {"NSA": "#0b6e4f", "full": "#c8553d"}
_MARKERS, _LINES = "osd^v*", ("-", "--", "-.", ":")

_Group = Sequence[DecodeRecord]


def legend(ceilings: Ceilings) -> str:
    """How to read the tables, and the measured rate behind the floors."""
    return (
        "ms a step: eager, launched by Python, and in a CUDA graph (of one layer: with an empty L2 cache).\n"
        f"Floors: keys and values that must be read, at {ceilings.copy_bytes / 1e9:.4g} GB/s (measured copy); "
        "of floor: share of it that the graph reaches.\n"
        "best: the fastest full attention; vs: how many times as fast NSA is. nsa separate: the sliding branch has "
        "keys of its own; nsa shared: not;\ndense: our own kernels. "
        "The whole model: random weights, a cache of random numbers, no prefill behind it"
    )


def decode_tables(records: _Group) -> str:
    """A table for every shape, for the steps of the model and for its prefill; then why times are missing."""
    tables = []
    for group in _groups(records):
        modules = dict.fromkeys(record.implementation for record in group if record.implementation)
        tables.append(f"{'; '.join([group[0].case.description, *modules])}\n\n{_table(group)}")
    missing: dict[str, list[str]] = {}
    for record in records:
        if record.reason is not None:
            text = f"{record.case.kind} {record.case.name}, {record.method}: {record.reason}"
            missing.setdefault(text, []).append(f"{record.case.batch_size} x {record.case.context}")
    lines = (f"- at {', '.join(sizes)} tokens, {text}" for text, sizes in missing.items())
    return "\n\n".join([*tables, "\n".join(lines)]).rstrip()


def _groups(records: _Group) -> list[list[DecodeRecord]]:
    """The records of each kind and name, in the order in which these came."""
    groups: dict[tuple[str, str], list[DecodeRecord]] = {}
    for record in records:
        groups.setdefault((record.case.kind, record.case.name), []).append(record)
    return list(groups.values())


def _table(records: _Group) -> str:
    """One row a case; columns in which nothing was measured are left out."""
    cases = list(dict.fromkeys(record.case for record in records))
    methods = list(dict.fromkeys(record.method for record in records))
    columns = [("batch, tokens", [f"{case.batch_size:<3} {case.context}" for case in cases])]

    def add(title: str, cell: Callable[[DecodeRecord], str], chosen: Sequence[DecodeRecord | None]) -> None:
        columns.append((title, ["-" if record is None else cell(record) for record in chosen]))

    for method in methods:
        found = [_find(records, case, method) for case in cases]
        add(f"{method} eager", lambda record: number(record.eager_ms), found)
        add("graph", lambda record: number(record.graph_ms), found)
    ours, best = [_ours(records, case) for case in cases], [_best_full(records, case) for case in cases]
    for title, found in (("nsa", ours), ("full", best)):
        add(f"{title} floor", lambda record: number(record.floor_ms), found)
        add("of floor", lambda record: _percent(ratio(record.floor_ms, record.graph_ms)), found)
    add("best", lambda record: record.method, best if len(methods) > 2 else [])
    for title, name in (("vs eager", "eager_ms"), ("vs graph", "graph_ms")):
        columns.append((title, [number(_times_as_fast(records, case, name), "x") for case in cases]))
    for title, found in (("nsa", ours), ("full", best)):
        add(f"{title} tokens/s", lambda record: _thousands(record.tokens_per_second), found)
    columns = [column for column in columns if any(cell != "-" for cell in column[1])]
    return text_table([title for title, _ in columns], zip(*(cells for _, cells in columns), strict=True))


def _find(records: _Group, case: DecodeCase, method: str) -> DecodeRecord | None:
    return next((record for record in records if (record.case, record.method) == (case, method)), None)


def _ours(records: _Group, case: DecodeCase) -> DecodeRecord | None:
    """What is compared with full attention: the first method that is not."""
    return next((record for record in records if record.case == case and not record.full), None)


def _best_full(records: _Group, case: DecodeCase) -> DecodeRecord | None:
    """The fastest full attention, as CUDA graphs where there are any."""
    timed = [record for record in records if record.case == case and record.full and record.ms is not None]
    return min(timed, key=lambda record: (record.graph_ms is None, record.ms), default=None)


def _times_as_fast(records: _Group, case: DecodeCase, name: str) -> float | None:
    """Time of the fastest full attention over that of NSA, both eager or both as graphs."""
    ours = _ours(records, case)
    times = [getattr(record, name) for record in records if record.case == case and record.full]
    best = min((ms for ms in times if ms is not None), default=None)
    return ratio(best, getattr(ours, name)) if ours is not None else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _thousands(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def draw_decode(records: _Group, title: str, path: Path) -> None:
    """Draw ms a step against context, a panel for each shape and the model, NSA beside the fastest full attention.

    Args:
        records: all measurements; prefills and those without a time are left out.
        title: heading.
        path: the PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [group for group in _groups(records) if group[0].case.kind != "prefill"]
    figure = Figure(figsize=(6.4 * len(groups), 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        _draw_panel(panel, group)
        panel.set_title(group[0].case.description, fontsize=9)
    figure.suptitle(title)
    figure.savefig(path, format="png")


def _draw_panel(panel: Any, records: _Group) -> None:
    """A pair of lines for each batch size."""
    cases = sorted({record.case for record in records}, key=lambda case: (case.batch_size, case.context))
    batch_sizes = list(dict.fromkeys(case.batch_size for case in cases))
    drawn: list[tuple[int, float]] = []
    for index, batch_size in enumerate(batch_sizes):
        for name, choose in (("NSA", _ours), ("full", _best_full)):
            chosen = [choose(records, case) for case in cases if case.batch_size == batch_size]
            points = [(record.case.context, record.ms) for record in chosen if record is not None and record.ms]
            if points:
                style = {"marker": _MARKERS[index % 6], "ls": _LINES[index % 4], "color": _COLOURS[name]}
                panel.plot(*zip(*points, strict=True), ms=5, label=f"{name}, batch {batch_size}", **style)
            drawn += points
    if not drawn:
        write_not_measured(panel)
        return
    set_axes(panel, drawn)
    panel.legend(fontsize=8)
