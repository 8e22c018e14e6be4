"""Problems with an answer that can be checked, such as those of AIME: many samples, and the share that is right."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.evaluation.case import Answer, Case, PlannedCase
from nsa_lightning.evaluation.extra import require
from nsa_lightning.evaluation.jsonl import read_records
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.generation.sampling import SamplingConfig

_CHAT = "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_COMPLETION = "Problem: {problem}\n\nPut the final answer within \\boxed{{}}.\n\nSolution:"


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    """How problems are answered; as the paper does where nothing else is said.

    Raises:
        ValueError: a value is out of range.
    """

    samples: int = 16
    """Answers to each problem."""

    max_new_tokens: list[int] = field(default_factory=lambda: [8192, 16384])
    """Longest answers, tokens; each is measured by itself."""

    temperature: float = 0.7
    """Of the samples."""

    top_p: float = 0.95
    """Of the samples."""

    seed: int = 0
    """Sample i of a problem starts from seed + i."""

    def __post_init__(self) -> None:
        check_types(self, "reasoning.")
        if self.samples < 1:
            raise SettingError(f"reasoning.samples must be at least 1, got {self.samples}")
        if not self.max_new_tokens or min(self.max_new_tokens) < 1:
            raise SettingError(f"reasoning.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        SamplingConfig(temperature=self.temperature, top_p=self.top_p)


class ReasoningTask:
    """All problems with one limit of new tokens.

    Args:
        path: jsonl with `problem` and `answer` in each line.
        limit: longest answer, tokens.
        config: how many samples, and how they are drawn.
        max_seq_len: tokens of the model's context.
        form: of the prompt.

    Raises:
        ValueError: the file cannot be read, `math-verify` is not installed, or the context is too short.
    """

    def __init__(self, path: Path, limit: int, config: ReasoningConfig, max_seq_len: int, form: PromptForm) -> None:
        self.name = f"reasoning_{limit}"
        require("math_verify", self.name)
        if limit >= max_seq_len:
            raise SettingError(
                f"reasoning.max_new_tokens must be below the {max_seq_len} tokens that the model is made for, "
                f"got {limit}"
            )
        self.stop = StopConfig(max_new_tokens=limit)
        self.sampling = SamplingConfig(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
        self._problems = [_problem(record, place) for place, record in read_records(path, "problems")]
        self._limit, self._config, self._max_seq_len, self._form = limit, config, max_seq_len, form
        self.settings: Mapping[str, Any] = {
            "file": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": config.seed,
            "form": form.name,
        }

    def cases(self) -> list[PlannedCase]:
        """By problem and sample."""
        return [
            PlannedCase(f"{number}/{sample}", None, None, partial(self._build, *problem, sample))
            for number, problem in enumerate(self._problems, start=1)
            for sample in range(self._config.samples)
        ]

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """1 where the last answer that the text gives is mathematically the right one."""
        from math_verify import parse, verify

        right = parse(f"\\boxed{{{case.answers[0]}}}")
        return {"score": float(verify(right, parse(answer.text)))}

    def _build(self, problem: str, right: str, sample: int) -> Case:
        text = (_CHAT if self._form.is_chat else _COMPLETION).format(problem=problem)
        prompt = self._form.prompt(text)
        if len(prompt) + self._limit > self._max_seq_len:
            raise SettingError(
                f"reasoning.max_new_tokens with a problem's {len(prompt)} tokens must be at most the "
                f"{self._max_seq_len} that the model is made for, got {self._limit}"
            )
        return Case(prompt=prompt, answers=[right], max_new_tokens=self._limit, seed=self._config.seed + sample)


def _problem(record: Mapping[str, Any], place: str) -> tuple[str, str]:
    problem, answer = record.get("problem"), record.get("answer")
    if not isinstance(problem, str) or not problem or not isinstance(answer, str | int | float) or answer == "":
        raise SettingError(f'problems: {place} must hold "problem", a text, and "answer", got {list(record)}')
    return problem, str(answer)
