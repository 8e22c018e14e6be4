"""A library's own tasks on our models: its requests are answered here, and kept, so that a killed run goes on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from nsa_lightning.evaluation.answering import Answerer
from nsa_lightning.evaluation.case import Answer, Case
from nsa_lightning.evaluation.results import CaseResult, ResultFile
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.generation.sampling import SamplingConfig

REQUESTS = "requests"
"""The task's name of a suite's single requests, which are no result of their own."""

Ask = Callable[[Mapping[str, Case], StopConfig, SamplingConfig], Mapping[str, Answer]]
"""Answers cases by their names."""


class SuiteResult(NamedTuple):
    """What one task came to."""

    task: str
    scores: dict[str, float]  # `score`, and every metric by its name
    cases: int


class Suite(Protocol):
    """Tasks that bring their own questions and metrics."""

    @property
    def tasks(self) -> list[str]:
        """Names of the results."""
        ...

    def settings(self, task: str) -> Mapping[str, Any]:
        """What a result depends on, as JSON."""
        ...

    def run(self, tasks: Sequence[str], ask: Ask) -> Iterator[SuiteResult]:
        """Results of some of the tasks."""
        ...


class KeptAnswers:
    """Answers requests once, whatever run they come in.

    Args:
        answerer: the model.
        results: where answers are kept.
        key: of the model and the method.
        method: its name.
    """

    def __init__(self, answerer: Answerer, results: ResultFile, key: str, method: str) -> None:
        self._answerer, self._results, self._key, self._method = answerer, results, key, method

    def __call__(self, cases: Mapping[str, Case], stop: StopConfig, sampling: SamplingConfig) -> Mapping[str, Answer]:
        """The answers to all cases; those that are not known are asked, and kept as they come."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        names = [name for name in cases if (self._key, name) not in self._results.cases]
        asked = self._answerer.answers([cases[name] for name in names], stop, sampling)
        for number, answer in tqdm(asked, total=len(names), desc="requests", unit="request", leave=False, disable=None):
            scores = {"log_probability": float(sum(answer.log_probs)), "likeliest": float(answer.likeliest)}
            result = CaseResult(
                key=self._key,
                method=self._method,
                task=REQUESTS,
                case=names[number],
                length=None,
                depth=None,
                tokens=len(cases[names[number]].prompt),
                scores=scores,
                answer=answer.text,
            )
            self._results.add(result)
        return {name: _answer(self._results.cases[self._key, name]) for name in cases}


def _answer(result: CaseResult) -> Answer:
    """What the result was made of, as far as suites ask for it: the sum of the log-probabilities is one of them."""
    scores = result.scores
    return Answer(result.answer, 0, None, [scores["log_probability"]], bool(scores["likeliest"]))
