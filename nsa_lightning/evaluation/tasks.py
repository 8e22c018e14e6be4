"""The tasks that `nsa evaluate` knows, by their names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nsa_kernels.errors import SettingError

from nsa_lightning.evaluation.case import Task
from nsa_lightning.evaluation.needle import NeedleConfig, NeedleTask
from nsa_lightning.evaluation.prompt_form import PromptForm


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """What the tasks are made with."""

    lengths: Sequence[int]
    """Tokens of prompt and answer together, of tasks that are made at any length."""
    needle: NeedleConfig = field(default_factory=NeedleConfig)


def split_names(words: Sequence[str]) -> list[str]:
    """Names of tasks as they were typed, apart or with commas between them."""
    return list(dict.fromkeys(name.strip() for word in words for name in word.split(",") if name.strip()))


def check_names(names: Sequence[str]) -> None:
    """Refuse a name that is no task's.

    Raises:
        ValueError: says which there are.
    """
    for name in names:
        if name not in _MAKERS:
            raise SettingError(f"tasks must be of {', '.join(_MAKERS)}, got {name}")
    if not names:
        raise SettingError(f"tasks must name one or more of {', '.join(_MAKERS)}, got none")


def open_tasks(names: Sequence[str], settings: TaskSettings, form: PromptForm) -> list[Task]:
    """The tasks of those names, their files read.

    Raises:
        ValueError: a file that a task needs is missing or broken.
    """
    check_names(names)
    return [task for name in names for task in _MAKERS[name](settings, form)]


def _needles(settings: TaskSettings, form: PromptForm) -> list[Task]:
    return [
        NeedleTask(family, settings.needle, settings.lengths, form)
        for family in dict.fromkeys(settings.needle.families)
    ]


_MAKERS: dict[str, Callable[[TaskSettings, PromptForm], list[Task]]] = {"needle": _needles}
