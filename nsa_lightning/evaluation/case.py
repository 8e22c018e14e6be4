"""What a model is asked and what it answered, whatever the task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from nsa_lightning.generation.generate import Finish, StopConfig
from nsa_lightning.generation.sampling import SamplingConfig

GREEDY = SamplingConfig(temperature=0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question with its answer."""

    prompt: list[int]
    """Tokens before the answer; at least one."""

    answers: Sequence[str]
    """What the task counts as right: every value to be found, or any of several references."""

    expected: list[int] = field(default_factory=list)
    """Tokens of a right answer, whose likelihood is measured; none: it is not."""

    max_new_tokens: int = 0
    """Longest answer; 0 where only likelihoods are measured."""

    seed: int = 0
    """Of the answer's random numbers, where it is sampled."""

    whole: bool = False
    """Measure the loss of every token of the prompt instead of asking for an answer."""

    details: Mapping[str, Any] = field(default_factory=dict)
    """What scoring needs beside the answers."""


class PlannedCase(NamedTuple):
    """A case before its prompt is made, which takes time."""

    name: str  # unique within its task
    length: int | None  # tokens of prompt and answer together; None where the task does not set it
    depth: float | None  # where in the text the answer lies, 0 at the beginning and 1 at the end
    build: Callable[[], Case]


class Answer(NamedTuple):
    """What a model gave back."""

    text: str
    tokens: int  # of the text
    finish: Finish | None  # None where no answer was asked for
    log_probs: Sequence[float] = ()  # of each expected token in nats, or of each token of a whole prompt but the first
    likeliest: bool = False  # whether every expected token was the likeliest


class Task(Protocol):
    """Cases and how their answers are counted."""

    name: str
    settings: Mapping[str, Any]
    """What its cases and scores depend on, as JSON; results of other settings are not mixed with these."""
    sampling: SamplingConfig
    stop: StopConfig
    """Where answers end; a case's own max_new_tokens has precedence."""

    def cases(self) -> list[PlannedCase]:
        """All cases, in the order in which they are run."""
        ...

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """The counts of one answer by name, `score` among them; means over cases are reported."""
        ...


def mean_log_probability(answer: Answer) -> dict[str, float]:
    """The likelihood of what was expected, in nats a token, where it was measured."""
    if not answer.log_probs:
        return {}
    return {"log_probability": sum(answer.log_probs) / len(answer.log_probs)}
