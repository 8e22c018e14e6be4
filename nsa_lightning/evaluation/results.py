"""Results by case, appended to a file as they come, so that a run that was killed goes on where it was."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError

from nsa_lightning.data.storage import writable

FORMAT = 1
CASES, SUMMARY = "cases.jsonl", "summary.json"


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One answered case."""

    key: str
    """Of everything that the result depends on: model, method and task with their settings."""
    method: str
    task: str
    case: str
    length: int | None
    depth: float | None
    tokens: int
    """Of the prompt."""
    scores: dict[str, float]
    answer: str = ""
    answers: list[str] = field(default_factory=list)
    """What was counted as right."""
    new_tokens: int = 0
    finish: str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method took on one task and length."""

    method: str
    task: str
    length: int | None
    cases: int
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    cache_bytes: int
    """Of the longest sequence."""
    statistics: dict[str, float] = field(default_factory=dict)
    """Means of what the method counted."""

    @property
    def prefill_rate(self) -> float | None:
        """Tokens of prompts a second; None where none was timed."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens of answers a second, over all sequences of a batch; None where none was timed."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None


@dataclass(frozen=True, kw_only=True)
class CostResult(Cost):
    """The cost in one run of the command."""

    key: str
    """As a case's."""


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Changes with any of the settings."""
    text = json.dumps([FORMAT, settings], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class ResultFile:
    """The results in a directory.

    Args:
        directory: made if it does not exist.
        anew: forget the results that are there.

    Raises:
        ValueError: it cannot be written, or a line in the middle of its file is broken.
    """

    def __init__(self, directory: Path, anew: bool = False) -> None:
        self.directory = directory
        self._path = directory / CASES
        with writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            if anew:
                self._path.unlink(missing_ok=True)
        self.cases: dict[tuple[str, str], CaseResult] = {}
        """By key and case."""
        self.costs: list[CostResult] = []
        for line in self._whole_lines():
            self._take(line)

    def add(self, result: CaseResult | CostResult) -> None:
        """Append a result; it is on the disk when this returns."""
        kind = "case" if isinstance(result, CaseResult) else "cost"
        line = {"kind": kind} | {name: value for name, value in vars(result).items() if value not in (None, [], {})}
        with writable(self._path), self._path.open("ab") as stream:
            stream.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        fields = dict(line)
        if fields.pop("kind") == "case":
            result = CaseResult(**({"length": None, "depth": None} | fields))
            self.cases[result.key, result.case] = result
        else:
            self.costs.append(CostResult(**({"length": None} | fields)))

    def _whole_lines(self) -> Iterator[dict[str, Any]]:
        """The lines; a last one that a kill has cut is taken off the file."""
        if not self._path.exists():
            return
        content = self._path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            with writable(self._path), self._path.open("r+b") as stream:
                stream.truncate(len(content) - len(torn))
        for number, line in enumerate(whole.split(b"\n") if whole else [], start=1):
            try:
                found = json.loads(line)
                found["kind"], found["key"]
            except (ValueError, KeyError, TypeError) as error:
                raise SettingError(f"output_dir: {self._path}:{number} is no result: {error!r}") from error
            yield found
