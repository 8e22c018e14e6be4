"""Means over cases, as they are written for tables and pictures."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError

from nsa_lightning.data.storage import whole_file
from nsa_lightning.evaluation.results import FORMAT, CaseResult, Cost, CostResult


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one task, at one length and depth where the task has them."""

    method: str
    task: str
    length: int | None
    depth: float | None
    cases: int
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One run of `nsa evaluate`: what it measured, on what."""

    model: str
    settings: dict[str, Any]
    """Of the model and the run."""
    methods: dict[str, dict[str, Any]]
    """Settings by method."""
    rows: list[Row]
    costs: list[Cost] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON."""
        with whole_file(path) as stream:
            stream.write(json.dumps({"format": FORMAT} | asdict(self), indent=1, ensure_ascii=False).encode())

    @classmethod
    def read(cls, path: Path) -> "Summary":
        """What `write` wrote.

        Raises:
            ValueError: it is none.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(**row) for row in content.pop("rows")]
            costs = [Cost(**row) for row in content.pop("costs")]
            content.pop("format")
            return cls(rows=rows, costs=costs, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(f"table must name summaries of nsa evaluate, got {path}: {error}") from error

    def mean(self, method: str, task: str, score: str = "score", length: int | None = None) -> float | None:
        """Over the cases of a task, of one length if that is given; None where there are none."""
        rows = [
            row
            for row in self.rows
            if (row.method, row.task) == (method, task) and score in row.scores and length in (None, row.length)
        ]
        count = sum(row.cases for row in rows)
        return sum(row.scores[score] * row.cases for row in rows) / count if count else None


def case_rows(results: Iterable[CaseResult]) -> list[Row]:
    """Means by method, task, length and depth, in the order in which they came."""
    groups: dict[tuple[str, str, int | None, float | None], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((result.method, result.task, result.length, result.depth), []).append(result)
    return [
        Row(
            method=method,
            task=task,
            length=length,
            depth=depth,
            cases=len(found),
            scores=means([each.scores for each in found]),
        )
        for (method, task, length, depth), found in groups.items()
    ]


def cost_rows(results: Iterable[CostResult]) -> list[Cost]:
    """Costs by method, task and length, over all runs that took part."""
    groups: dict[tuple[str, str, int | None], list[Cost]] = {}
    for result in results:
        own = {name: value for name, value in vars(result).items() if name != "key"}
        groups.setdefault((result.method, result.task, result.length), []).append(Cost(**own))
    return [together(found) for found in groups.values()]


def together(costs: Sequence[Cost]) -> Cost:
    """The costs of one method as one: tokens and seconds add up, what was counted is averaged over the cases."""
    sums = ("cases", "prefill_tokens", "prefill_seconds", "decode_tokens", "decode_seconds")
    return replace(
        costs[0],
        cache_bytes=max(each.cache_bytes for each in costs),
        statistics=_weighted([(each.cases, each.statistics) for each in costs]),
        **{name: sum(getattr(each, name) for each in costs) for name in sums},
    )


def means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over those that have it."""
    names = dict.fromkeys(name for each in scores for name in each)
    found = {name: [each[name] for each in scores if name in each] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _weighted(parts: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    names = dict.fromkeys(name for _, values in parts for name in values)
    having = {name: [(weight, values[name]) for weight, values in parts if name in values] for name in names}
    return {name: sum(w * v for w, v in found) / max(sum(w for w, _ in found), 1) for name, found in having.items()}
