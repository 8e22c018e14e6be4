"""Tasks of lm-evaluation-harness, among them the general ones of the paper with its numbers of examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.evaluation.extra import require
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.suite import Ask, SuiteResult

PREFIX = "lm_eval:"
GROUP = "paper_general"

_SHOTS = {
    "mmlu": 5,
    "mmlu_pro": 5,
    "cmmlu": 5,
    "bbh": 3,
    "gsm8k": 8,
    "minerva_math": 4,
    "drop": 1,
    "mbpp": 3,
    "humaneval": 0,
}
"""Examples before each question, by task (arXiv:2502.11089, table 1)."""

_METRICS = {"drop": "f1"}
"""What counts where it is not the first of a task's metrics."""

_RUNS_CODE = frozenset({"mbpp", "humaneval"})


@dataclass(frozen=True, kw_only=True)
class LmEvalConfig:
    """How its tasks are run.

    Raises:
        ValueError: a value is out of range.
    """

    num_fewshot: int | None = None
    """Examples before each question; if not given the paper's for the tasks of `paper_general`, else the task's own."""

    limit: int | None = None
    """The first questions of each task, and of each part of it; all if not given."""

    tasks_dir: str | None = None
    """A directory of task files (.yaml) of yours."""

    run_generated_code: bool = False
    """Allow tasks such as humaneval, which run the code that the model writes, on this machine."""

    def __post_init__(self) -> None:
        check_types(self, "lm_eval.")
        for name, least in (("num_fewshot", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingError(f"lm_eval.{name} must be at least {least}, got {value}")


class LmEvalSuite:
    """Some tasks, each with its number of examples.

    Args:
        names: tasks and groups, or `paper_general`.
        config: how they are run.
        max_seq_len: tokens of the model's context.
        form: of the prompts.

    Raises:
        ValueError: `lm_eval` is not installed, has no such task, or code would be run that must not be.
    """

    def __init__(self, names: Sequence[str], config: LmEvalConfig, max_seq_len: int, form: PromptForm) -> None:
        require("lm_eval", PREFIX.rstrip(":"))
        self._config, self._max_seq_len, self._form = config, max_seq_len, form
        self._names = [each for name in names for each in (_SHOTS if name == GROUP else [name])]
        self._manager = _task_manager(config.tasks_dir)
        for name in self._names:
            if name not in self._manager.all_tasks:
                raise SettingError(f"tasks: lm_eval has no task {name}")
            if name in _RUNS_CODE and not config.run_generated_code:
                raise SettingError(
                    f"lm_eval.run_generated_code must be true for {name}, which runs the code that the model writes"
                )

    @property
    def tasks(self) -> list[str]:
        """Names of the results."""
        return [_result_name(name) for name in self._names]

    def settings(self, task: str) -> Mapping[str, Any]:
        """What a result depends on."""
        own = {name: value for name, value in asdict(self._config).items() if name != "run_generated_code"}
        return own | {"shots": self._shots(_lm_eval_name(task)), "form": self._form.name}

    def run(self, tasks: Sequence[str], ask: Ask) -> Iterator[SuiteResult]:
        """Results of some of the tasks."""
        import os

        from lm_eval import simple_evaluate

        from nsa_lightning.evaluation.lm_eval_model import EvaluatedLM

        model = EvaluatedLM(ask, self._form, self._max_seq_len)
        if self._config.run_generated_code:
            os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
        for task in tasks:
            name = _lm_eval_name(task)
            found = simple_evaluate(
                model=model,
                tasks=[name],
                num_fewshot=self._shots(name),
                limit=self._config.limit,
                bootstrap_iters=0,
                log_samples=False,
                task_manager=self._manager,
                apply_chat_template=self._form.is_chat,
                fewshot_as_multiturn=False,
                confirm_run_unsafe_code=self._config.run_generated_code,
            )
            assert found is not None
            yield _result(task, found)

    def _shots(self, name: str) -> int | None:
        return _SHOTS.get(name) if self._config.num_fewshot is None else self._config.num_fewshot


@cache
def _task_manager(tasks_dir: str | None) -> Any:
    """Knows all tasks, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=tasks_dir)


def _result_name(name: str) -> str:
    return f"lm_eval_{name}"


def _lm_eval_name(task: str) -> str:
    return task.removeprefix("lm_eval_")


def _result(task: str, found: Mapping[str, Any]) -> SuiteResult:
    """The task's own line of the results of `lm_eval`, whose metrics are named `acc,none`."""
    name = _lm_eval_name(task)
    line = found["results"][name]
    metrics = {
        metric: float(value)
        for metric, value in line.items()
        if isinstance(value, int | float) and "," in metric and "_stderr," not in metric
    }
    wanted = _METRICS.get(name)
    main = next((value for metric, value in metrics.items() if wanted in (None, metric.partition(",")[0])), None)
    if main is None:
        raise SettingError(f"tasks: lm_eval counted nothing for {name}")
    counts = [sample.get("effective", 0) for sample in found.get("n-samples", {}).values()]
    return SuiteResult(task, {"score": main} | metrics, sum(counts))
