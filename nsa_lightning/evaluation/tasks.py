"""The tasks that `nsa evaluate` knows, by their names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.evaluation.case import Task
from nsa_lightning.evaluation.lm_eval_tasks import PREFIX, LmEvalConfig, LmEvalSuite
from nsa_lightning.evaluation.longbench import LongBenchConfig, longbench_tasks
from nsa_lightning.evaluation.needle import NeedleConfig, NeedleTask
from nsa_lightning.evaluation.positions import PositionTask
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.question_answering import QuestionTask
from nsa_lightning.evaluation.reasoning import ReasoningConfig, ReasoningTask
from nsa_lightning.evaluation.ruler import RULER_KINDS, RulerConfig, RulerTask
from nsa_lightning.evaluation.suite import Suite


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the tasks are made with."""

    lengths: Sequence[int]
    """Tokens of prompt and answer together, of tasks that are made at any length."""
    max_seq_len: int
    """Tokens of the model's context."""
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    ruler: RulerConfig = field(default_factory=RulerConfig)
    longbench: LongBenchConfig = field(default_factory=LongBenchConfig)
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    longbench_dir: str | None = None
    """Of `longbench`."""
    problems: str | None = None
    """Of `reasoning`."""
    documents: str | None = None
    """Of `questions`."""
    texts: Sequence[str] = ()
    """Of `positions`."""
    text_samples: int = 4
    """Documents of `positions`."""


def split_names(words: Sequence[str]) -> list[str]:
    """Names of tasks as they were typed, apart or with commas between them.

    In one word all names behind `lm_eval:` are tasks of that library: `needle,lm_eval:mmlu,gsm8k`.
    """
    names: list[str] = []
    for word in words:
        own, mark, theirs = word.partition(PREFIX)
        names += [name.strip() for name in own.split(",")]
        names += [f"{PREFIX}{name.strip()}" for name in theirs.split(",")] if mark else []
    return list(dict.fromkeys(name for name in names if name))


def check_names(names: Sequence[str]) -> None:
    """Refuse a name that is no task's.

    Raises:
        ValueError: says which there are.
    """
    known = f"{', '.join(_MAKERS)} and {PREFIX}TASK"
    for name in names:
        if name not in _MAKERS and (not name.startswith(PREFIX) or name == PREFIX):
            raise SettingError(f"tasks must be of {known}, got {name}")


def open_tasks(names: Sequence[str], settings: TaskSettings, form: PromptForm) -> list[Task]:
    """The tasks of those names, their files read.

    Raises:
        ValueError: a file that a task needs is missing or broken.
    """
    check_names(names)
    return [task for name in names if name in _MAKERS for task in _MAKERS[name](settings, form)]


def open_suites(names: Sequence[str], settings: TaskSettings, form: PromptForm) -> list[Suite]:
    """The tasks of libraries among those names.

    Raises:
        ValueError: a library is not installed, or has no such task.
    """
    chosen = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    return [LmEvalSuite(chosen, settings.lm_eval, settings.max_seq_len, form)] if chosen else []


def _needles(settings: TaskSettings, form: PromptForm) -> Sequence[Task]:
    families = dict.fromkeys(settings.needle.families)
    return [NeedleTask(family, settings.needle, settings.lengths, form) for family in families]


def _ruler(settings: TaskSettings, form: PromptForm) -> Sequence[Task]:
    return [RulerTask(kind, settings.ruler, settings.lengths, form) for kind in RULER_KINDS]


def _positions(settings: TaskSettings, form: PromptForm) -> Sequence[Task]:
    if not settings.texts:
        raise SettingError("texts must be given for the task positions, got none")
    return [PositionTask(settings.texts, settings.text_samples, max(settings.lengths), form)]


def _questions(settings: TaskSettings, form: PromptForm) -> Sequence[Task]:
    return [QuestionTask(_given(settings.documents, "documents", "questions"), settings.max_seq_len, form)]


def _longbench(settings: TaskSettings, form: PromptForm) -> Sequence[Task]:
    place = _given(settings.longbench_dir, "longbench_dir", "longbench")
    return longbench_tasks(place, settings.longbench, settings.max_seq_len, form)


def _reasoning(settings: TaskSettings, form: PromptForm) -> Sequence[Task]:
    path, config = _given(settings.problems, "problems", "reasoning"), settings.reasoning
    return [ReasoningTask(path, limit, config, settings.max_seq_len, form) for limit in config.max_new_tokens]


def _given(path: str | None, setting: str, task: str) -> Path:
    if path is None:
        raise SettingError(f"{setting} must be given for the task {task}, got none")
    return Path(path)


_MAKERS: dict[str, Callable[[TaskSettings, PromptForm], Sequence[Task]]] = {
    "needle": _needles,
    "ruler": _ruler,
    "positions": _positions,
    "questions": _questions,
    "longbench": _longbench,
    "reasoning": _reasoning,
}
