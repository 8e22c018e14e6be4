"""Runs tasks on a model under several methods, and keeps what comes of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor

from nsa_lightning.evaluation.answering import Answerer
from nsa_lightning.evaluation.case import Answer, Case, PlannedCase, Task
from nsa_lightning.evaluation.figures import save_figure
from nsa_lightning.evaluation.maps import draw_selection, selection_maps
from nsa_lightning.evaluation.method import Method
from nsa_lightning.evaluation.results import CaseResult, CostResult, ResultFile, fingerprint
from nsa_lightning.evaluation.suite import REQUESTS, KeptAnswers, Suite
from nsa_lightning.evaluation.summary import Summary, case_rows, cost_rows
from nsa_lightning.generation.text_model import TextModel
from nsa_lightning.model.transformer import Transformer

MEAN = "mean"
"""The name of a suite's result of a task, which is over all of its cases."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How cases are run.

    Raises:
        ValueError: a value is out of range.
    """

    batch_size: int = 8
    """Cases that are answered at once, fewer where their caches do not fit the memory."""

    cuda_graphs: bool = True
    """Replay steps of decoding as CUDA graphs; on a GPU only."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.batch_size < 1:
            raise SettingError(f"batch_size must be at least 1, got {self.batch_size}")


class Evaluation:
    """Tasks, methods and a model.

    Args:
        opened: the model.
        path: where it is.
        tasks: what is asked.
        methods: how the model attends, one after another.
        suites: tasks that bring their own questions.
        device: of the model.
        dtype: of its weights and cache.
        config: how cases are run.
    """

    def __init__(
        self,
        opened: TextModel,
        path: Path,
        tasks: Sequence[Task],
        methods: Sequence[Method],
        device: torch.device,
        dtype: torch.dtype,
        config: RunConfig = RunConfig(),
        suites: Sequence[Suite] = (),
    ) -> None:
        self._opened, self._tasks, self._methods, self._suites = opened, tasks, methods, suites
        self._device, self._dtype, self._config = device, dtype, config
        self._planned = {task.name: task.cases() for task in tasks}
        self._model_settings = model_settings(opened, path, dtype)

    def check(self) -> None:
        """Refuse what cannot be run, before weights are read.

        Raises:
            ValueError: a length is beyond the model's context, or too short for its task.
        """
        longest = max((case.length or 0 for cases in self._planned.values() for case in cases), default=0)
        if longest > self._opened.max_seq_len:
            raise SettingError(
                f"lengths must be within the {self._opened.max_seq_len} tokens that the model is made for "
                f"(--rope.scaling and --rope.factor extend them), got {longest}"
            )
        for cases in self._planned.values():
            if cases and cases[0].length is not None:
                min(cases, key=lambda case: case.length or 0).build()  # the shortest, which may have no room

    def run(self, results: ResultFile) -> None:
        """Answer all cases that have no result yet, and add theirs."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        todo = {
            (method.name, task.name): [
                case for case in self._planned[task.name] if (self._key(method, task), case.name) not in results.cases
            ]
            for method in self._methods
            for task in self._tasks
        }
        total = sum(len(self._planned[task.name]) for task in self._tasks) * len(self._methods)
        missing = sum(map(len, todo.values()))
        if not missing and not any(self._missing(method, results) for method in self._methods):
            return
        model = self._model
        with tqdm(total=total, initial=total - missing, desc="evaluate", unit="case", disable=None) as bar:
            for method in self._methods:
                for task in self._tasks:
                    for group in _groups(todo[method.name, task.name]):
                        bar.set_postfix_str(f"{method.name} {task.name} {group[0].length or ''}".strip())
                        for result in self._answered(model, method, task, group):
                            results.add(result)
                            bar.update(isinstance(result, CaseResult))
                self._run_suites(model, method, results)

    def draw_maps(self, tokens: Tensor, path: Path) -> None:
        """Draw which blocks of a text, int64 [T], each NSA layer selects."""
        maps = selection_maps(self._model, tokens.to(self._device))
        save_figure(path, draw_selection(maps, f"Blocks that queries chose, {len(tokens)} tokens"))

    @cached_property
    def _model(self) -> Transformer:
        """The model with its weights, read once they are needed."""
        return self._opened.load(self._device, self._dtype)

    def _missing(self, method: Method, results: ResultFile) -> list[tuple[Suite, list[str]]]:
        """Of each suite the tasks that have no result yet, if there are some."""
        found = [
            (suite, [task for task in suite.tasks if (self._suite_key(method, suite, task), MEAN) not in results.cases])
            for suite in self._suites
        ]
        return [(suite, tasks) for suite, tasks in found if tasks]

    def _run_suites(self, model: Transformer, method: Method, results: ResultFile) -> None:
        for suite, tasks in self._missing(method, results):
            answerer = self._answerer(model, method)
            ask = KeptAnswers(answerer, results, self._fingerprint(method, [REQUESTS]), method.name)
            for found in suite.run(tasks, ask):
                result = CaseResult(
                    key=self._suite_key(method, suite, found.task),
                    method=method.name,
                    task=found.task,
                    case=MEAN,
                    length=None,
                    depth=None,
                    tokens=0,
                    scores=found.scores,
                    details={"cases": found.cases},
                )
                results.add(result)

    def summary(self, results: ResultFile) -> Summary:
        """Means of the results of these settings."""
        keys = [self._key(method, task) for method in self._methods for task in self._tasks]
        keys += [
            self._suite_key(method, suite, task)
            for method in self._methods
            for suite in self._suites
            for task in suite.tasks
        ]
        names = {task: {case.name for case in cases} for task, cases in self._planned.items()}
        names |= {task: {MEAN} for suite in self._suites for task in suite.tasks}
        found = [each for each in results.cases.values() if each.key in keys and each.case in names[each.task]]
        order = {key: index for index, key in enumerate(keys)}
        found.sort(key=lambda each: (order[each.key], each.length or 0))
        lengths = {task: {case.length for case in cases} for task, cases in self._planned.items()}
        costs = [each for each in results.costs if each.key in keys and each.length in lengths[each.task]]
        return Summary(
            model=str(self._model_settings["model"]),
            settings=self._model_settings | {"run": asdict(self._config), "device": _device_name(self._device)},
            methods={method.name: dict(method.settings) for method in self._methods},
            rows=case_rows(found),
            costs=cost_rows(costs),
        )

    def _answered(
        self, model: Transformer, method: Method, task: Task, group: Sequence[PlannedCase]
    ) -> Iterator[CaseResult | CostResult]:
        """Build and answer some cases; their results as they come, and their cost at the end."""
        answerer = self._answerer(model, method)
        key, cases = self._key(method, task), [planned.build() for planned in group]
        for number, answer in answerer.answers(cases, task.stop, task.sampling):
            yield _result(key, method, task, group[number], cases[number], answer)
        yield CostResult(
            key=key,
            method=method.name,
            task=task.name,
            length=group[0].length,
            statistics={name: float(value) for name, value in method.statistics().items()},
            **asdict(answerer.cost),
        )

    def _answerer(self, model: Transformer, method: Method) -> Answerer:
        opened, config = self._opened, self._config
        return Answerer(model, opened.tokenizer, opened.end_tokens, method, config.batch_size, config.cuda_graphs)

    def _key(self, method: Method, task: Task) -> str:
        return self._fingerprint(method, [task.name, dict(task.settings)])

    def _suite_key(self, method: Method, suite: Suite, task: str) -> str:
        return self._fingerprint(method, [task, dict(suite.settings(task))])

    def _fingerprint(self, method: Method, task: list[Any]) -> str:
        """Of the model, a method and what is asked."""
        return fingerprint(
            {"model": self._model_settings, "method": [method.name, dict(method.settings)], "task": task}
        )


def model_settings(opened: TextModel, path: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What sets a model apart from others: its files, its config and the type of its numbers."""
    return {
        "model": str(path.resolve()),
        "files": {
            str(file.relative_to(path)): [file.stat().st_size, file.stat().st_mtime_ns] for file in _weight_files(path)
        },
        "config": asdict(opened.config),
        "tokenizer": opened.tokenizer.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _weight_files(path: Path) -> list[Path]:
    """A checkpoint's file, or what lies in its directory and in those of a run."""
    if not path.is_dir():
        return [path]
    kinds = (".safetensors", ".ckpt", ".distcp", ".pt")
    return sorted(file for file in path.rglob("*") if file.suffix in kinds or file.name == "config.json")


def _groups(cases: Sequence[PlannedCase]) -> Iterator[list[PlannedCase]]:
    """Cases of one length together, the order kept."""
    groups: dict[int | None, list[PlannedCase]] = {}
    for case in cases:
        groups.setdefault(case.length, []).append(case)
    yield from groups.values()


def _result(key: str, method: Method, task: Task, planned: PlannedCase, case: Case, answer: Answer) -> CaseResult:
    return CaseResult(
        key=key,
        method=method.name,
        task=task.name,
        case=planned.name,
        length=planned.length,
        depth=planned.depth,
        tokens=len(case.prompt),
        scores=task.score(case, answer),
        answer=answer.text,
        answers=list(case.answers),
        new_tokens=answer.tokens,
        finish=answer.finish,
        details=dict(case.details),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
