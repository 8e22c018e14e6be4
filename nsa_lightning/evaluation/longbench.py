"""LongBench v1 (arXiv:2308.14508) from the files that its authors publish, with their prompts and metrics."""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.evaluation.case import GREEDY, Answer, Case, PlannedCase
from nsa_lightning.evaluation.extra import require
from nsa_lightning.evaluation.jsonl import parse_records
from nsa_lightning.evaluation.longbench_metrics import FIRST_LINE, METRICS, NO_CHAT, PACKAGES
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.paths import expand_path

_ARCHIVE = "data.zip"


@dataclass(frozen=True, kw_only=True)
class LongBenchConfig:
    """Which of its datasets, and how much of them.

    Raises:
        ValueError: a value is out of range, or an unknown dataset.
    """

    datasets: list[str] = field(default_factory=list)
    """By their names, such as `hotpotqa`; all that are there if not given."""

    max_length: int | None = None
    """Tokens of prompt and answer together; longer prompts lose their middle. The model's context if not given."""

    limit: int | None = None
    """The first cases of each dataset; all if not given."""

    def __post_init__(self) -> None:
        check_types(self, "longbench.")
        for name in self.datasets:
            if name not in METRICS:
                raise SettingError(f"longbench.datasets must be of {', '.join(METRICS)}, got {name}")
        for name in ("max_length", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(f"longbench.{name} must be at least 1, got {value}")


class _Format(NamedTuple):
    """How a dataset asks."""

    prompt: str
    max_new_tokens: int


class LongBenchTask:
    """One dataset.

    Args:
        dataset: its name.
        content: its jsonl.
        config: how much of it.
        max_length: tokens of prompt and answer together.
        form: of the prompt; some datasets are continued as texts whatever it is.

    Raises:
        ValueError: a line is not as published, or the metric needs a package that is not installed.
    """

    sampling = GREEDY
    stop = StopConfig()

    def __init__(self, dataset: str, content: str, config: LongBenchConfig, max_length: int, form: PromptForm) -> None:
        self.name = f"longbench_{dataset}"
        self._dataset, self._metric, self._format = dataset, METRICS[dataset], _formats()[dataset]
        for package in PACKAGES.get(self._metric, ()):
            require(package, self.name)
        self._records = [
            _checked(record, place) for place, record in parse_records(content, f"{dataset}.jsonl", "longbench_dir")
        ][: config.limit]
        self._max_length, self._form = max_length, form.plain() if dataset in NO_CHAT else form
        digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        self.settings: Mapping[str, Any] = {"file": digest, "max_length": max_length, "form": self._form.name}

    def cases(self) -> list[PlannedCase]:
        """By line."""
        return [
            PlannedCase(str(number), None, None, partial(self._build, record))
            for number, record in enumerate(self._records, start=1)
        ]

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """The best by the dataset's metric over all right answers."""
        text = answer.text.lstrip("\n").split("\n")[0] if self._dataset in FIRST_LINE else answer.text
        return {"score": max(self._metric(text, right, case.details["classes"]) for right in case.answers)}

    def _build(self, record: Mapping[str, Any]) -> Case:
        question = self._format.prompt.format(context=record["context"], input=record["input"])
        prompt = self._form.longest(question, self._max_length - self._format.max_new_tokens)
        return Case(
            prompt=prompt,
            answers=record["answers"],
            max_new_tokens=self._format.max_new_tokens,
            details={"classes": record.get("all_classes") or []},
        )


def longbench_tasks(place: Path, config: LongBenchConfig, max_seq_len: int, form: PromptForm) -> list[LongBenchTask]:
    """Tasks of the datasets in a directory, or in the published archive.

    Args:
        place: a directory of `hotpotqa.jsonl` and the like, or with `data.zip`, or that archive.
        config: which datasets.
        max_seq_len: tokens of the model's context.
        form: of the prompts.

    Raises:
        ValueError: there are no such files, or one is not as published.
    """
    contents = _read(Path(expand_path(str(place))), config.datasets)
    length = min(config.max_length or max_seq_len, max_seq_len)
    return [LongBenchTask(name, content, config, length, form) for name, content in contents.items()]


@cache
def _formats() -> dict[str, _Format]:
    text = files("nsa_lightning.evaluation").joinpath("longbench_prompts.json").read_text(encoding="utf-8")
    return {name: _Format(**found) for name, found in json.loads(text)["datasets"].items()}


def _read(place: Path, datasets: Sequence[str]) -> dict[str, str]:
    """The jsonl of each wanted dataset, in the order of the metrics."""
    archive = place if place.suffix == ".zip" else place / _ARCHIVE
    found: dict[str, str] = {}
    try:
        if archive.is_file():
            with zipfile.ZipFile(archive) as opened:
                members = {Path(name).name: name for name in opened.namelist()}
                found = {
                    name: opened.read(members[f"{name}.jsonl"]).decode()
                    for name in METRICS
                    if f"{name}.jsonl" in members and name in (datasets or METRICS)
                }
        else:
            for name in METRICS:
                paths = [path for path in (place / f"{name}.jsonl", place / "data" / f"{name}.jsonl") if path.is_file()]
                if paths and name in (datasets or METRICS):
                    found[name] = paths[0].read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise SettingError(f"longbench_dir must hold readable LongBench files, got {place}: {error}") from error
    missing = [name for name in datasets if name not in found]
    if missing or not found:
        wanted = f"{missing[0]}.jsonl" if missing else "files such as hotpotqa.jsonl, or data.zip"
        raise SettingError(f"longbench_dir must be a directory of LongBench with {wanted}, got {place}")
    return found


def _checked(record: dict[str, Any], place: str) -> dict[str, Any]:
    answers = record.get("answers")
    texts = isinstance(record.get("context"), str) and isinstance(record.get("input"), str)
    if not texts or not isinstance(answers, list) or not answers or not all(isinstance(each, str) for each in answers):
        raise SettingError(
            f"longbench_dir: {place} must hold texts as context and input and a list of texts as answers, it has "
            f"{list(record)}"
        )
    return record
