"""Runs side by side in plain text, with the paper's columns and figures."""

from collections.abc import Iterator, Mapping, Sequence

from nsa_lightning.evaluation import paper
from nsa_lightning.evaluation.paper import PaperTable
from nsa_lightning.evaluation.results import Cost
from nsa_lightning.evaluation.summary import Summary, together
from nsa_lightning.text_table import number, text_table

_SCORES = {
    "score": "score",
    "log_probability": "log-probability of the answer, nats a token",
    "loss": "loss, nats a token",
}
"""What is shown by length, with its heading."""
_POSITION = "loss/"


def tables(runs: Mapping[str, Summary]) -> str:
    """All that the runs have measured, by their names."""
    lines = [(name, summary, method) for name, summary in runs.items() for method in summary.methods]
    found = [*_by_length(lines), *_by_position(lines), *_fixed_columns(lines), *_others(lines)]
    return "\n\n".join([*found, _costs(lines), _settings(lines)]).strip()


_Line = tuple[str, Summary, str]


def _name(line: _Line, lines: Sequence[_Line]) -> str:
    """The method, behind its run where there are several."""
    return line[2] if len({name for name, *_ in lines}) == 1 else f"{line[0]} {line[2]}"


def _tasks(lines: Sequence[_Line]) -> list[str]:
    return list(dict.fromkeys(row.task for _, summary, _ in lines for row in summary.rows))


def _by_length(lines: Sequence[_Line]) -> Iterator[str]:
    """A table for each task whose cases have lengths, and for each kind of score that it has."""
    for task in _tasks(lines):
        rows = [row for _, summary, _ in lines for row in summary.rows if row.task == task]
        lengths = sorted({row.length for row in rows if row.length is not None})
        for score, heading in _SCORES.items():
            if lengths and any(score in row.scores for row in rows):
                cells = [
                    (_name(line, lines), *(_cell(line[1].mean(line[2], task, score, length)) for length in lengths))
                    for line in lines
                ]
                note = f"\n{paper.NEEDLE}" if task == "needle_single" and score == "score" else ""
                yield f"{task}: {heading}\n\n{text_table(['', *map(_short, lengths)], cells)}{note}"


def _by_position(lines: Sequence[_Line]) -> Iterator[str]:
    """The loss from each position on."""
    scores = {name for _, summary, _ in lines for row in summary.rows for name in row.scores}
    starts = sorted(int(name.removeprefix(_POSITION)) for name in scores if name.startswith(_POSITION))
    if starts:
        cells = [
            (
                _name(line, lines),
                *(_cell(line[1].mean(line[2], "positions", f"{_POSITION}{start}")) for start in starts),
            )
            for line in lines
        ]
        yield f"positions: loss from each position on, nats a token\n\n{text_table(['', *map(_short, starts)], cells)}"


def _fixed_columns(lines: Sequence[_Line]) -> Iterator[str]:
    """The paper's tables of which at least one column was measured."""
    for table in (paper.LONGBENCH, paper.GENERAL, paper.REASONING):
        if set(table.tasks) & set(_tasks(lines)):
            yield _beside_paper(lines, table)


def _beside_paper(lines: Sequence[_Line], table: PaperTable) -> str:
    rows = []
    for line in lines:
        means = [line[1].mean(line[2], task) for task in table.tasks]
        known = [mean for mean in means if mean is not None]
        average = sum(known) / len(known) if len(known) == len(means) else None
        rows.append((_name(line, lines), *map(_cell, means), _cell(average)))
    for method, figures in table.figures.items():
        average = figures[-1] if len(figures) > len(table.tasks) else sum(figures) / len(figures)
        rows.append((f"paper: {method}", *map(_cell, figures[: len(table.tasks)]), _cell(average)))
    return f"{table.title}\n\n{text_table(['', *table.columns.values(), 'mean'], rows)}"


def _others(lines: Sequence[_Line]) -> Iterator[str]:
    """Tasks without lengths that the paper's tables do not have."""
    known = {task for table in (paper.LONGBENCH, paper.GENERAL, paper.REASONING) for task in table.tasks}
    measured = {row.task for _, summary, _ in lines for row in summary.rows if row.length is None}
    tasks = [task for task in _tasks(lines) if task in measured - known]
    if tasks:
        rows = [(task, *(_cell(summary.mean(method, task)) for _, summary, method in lines)) for task in tasks]
        yield f"Other tasks\n\n{text_table(['', *(_name(line, lines) for line in lines)], rows)}"


def _costs(lines: Sequence[_Line]) -> str:
    """Speed, memory and what a sparse method left out, by length, over all tasks."""
    groups: dict[tuple[str, int | None], list[Cost]] = {}
    for line in lines:
        for cost in line[1].costs:
            if cost.method == line[2]:
                groups.setdefault((_name(line, lines), cost.length), []).append(cost)
    if not groups:
        return ""
    rows = {place: together(costs) for place, costs in sorted(groups.items(), key=lambda item: item[0][1] or 0)}
    measured = list(dict.fromkeys(name for cost in rows.values() for name in cost.statistics))
    header = ["", "tokens", "prefill tokens/s", "decode tokens/s", "cache MB", *measured]
    cells = [
        [
            name,
            "-" if length is None else _short(length),
            number(cost.prefill_rate),
            number(cost.decode_rate),
            number(cost.cache_bytes / 1e6),
            *(_cell(cost.statistics.get(statistic)) for statistic in measured),
        ]
        for (name, length), cost in rows.items()
    ]
    return f"Cost\n\n{text_table(header, cells)}"


def _settings(lines: Sequence[_Line]) -> str:
    """A line for each method that has settings."""
    told = dict.fromkeys(
        f"{_name(line, lines)}: {', '.join(f'{name} {value}' for name, value in settings.items())}"
        for line in lines
        if (settings := line[1].methods[line[2]])
    )
    return "\n".join(told)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(length: int) -> str:
    return f"{length // 1024}K" if length and length % 1024 == 0 else str(length)
