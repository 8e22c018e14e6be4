"""Questions of the user's on texts of theirs: a jsonl of `question`, `answers` and, where it is a text's, `context`."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError

from nsa_lightning.evaluation.case import GREEDY, Answer, Case, PlannedCase
from nsa_lightning.evaluation.jsonl import read_records, text_of
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.scores import any_found, question_f1
from nsa_lightning.generation.generate import StopConfig

MAX_NEW_TOKENS = 64
_ASIDE = "Answer the question based on the given text. Only give me the answer and do not output any other words."


class _Record(NamedTuple):
    question: str
    answers: list[str]
    context: str


class QuestionTask:
    """Each line of a file is a case; texts that are too long lose their middle.

    Args:
        path: jsonl with `question`, `answers` (or `answer`) and `context` in each line; the context may be left out.
        max_length: tokens of prompt and answer together.
        form: of the prompt.

    Raises:
        ValueError: the file cannot be read, or a line lacks a field.
    """

    name = "questions"
    sampling = GREEDY
    stop = StopConfig()

    def __init__(self, path: Path, max_length: int, form: PromptForm) -> None:
        self._records = list(_records(path))
        self._max_length, self._form = max_length, form
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        self.settings: Mapping[str, Any] = {"file": digest, "max_length": max_length, "form": form.name}

    def cases(self) -> list[PlannedCase]:
        """By line."""
        return [
            PlannedCase(str(number), None, None, partial(self._build, record))
            for number, record in enumerate(self._records, start=1)
        ]

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """Whether one of the answers was found, and the best F1 of their words."""
        best = max(question_f1(answer.text.strip().split("\n")[0], right) for right in case.answers)
        return {"score": any_found(case.answers, answer.text), "f1": best}

    def _build(self, record: _Record) -> Case:
        text = f"{_ASIDE}\n\n{record.context}\n\nQuestion: {record.question}" if record.context else record.question
        beginning = "" if self._form.is_chat else "\nAnswer:"
        prompt = self._form.longest(text, self._max_length - MAX_NEW_TOKENS, beginning)
        return Case(prompt=prompt, answers=record.answers, max_new_tokens=MAX_NEW_TOKENS)


def _records(path: Path) -> Iterator[_Record]:
    for place, record in read_records(path, "documents"):
        found = record.get("answers", record.get("answer"))
        answers = [str(answer) for answer in (found if isinstance(found, list) else [found]) if answer]
        if not answers:
            raise SettingError(f'documents: {place} must hold a text, or a list of texts, as "answers"')
        yield _Record(text_of(record, "question", place, "documents"), answers, str(record.get("context") or ""))
