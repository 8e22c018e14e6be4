"""What a model can do while it is trained, in TensorBoard: tasks every so many steps, and which blocks it selects."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.evaluation.answering import Answerer
from nsa_lightning.evaluation.case import Case, Task
from nsa_lightning.evaluation.figures import as_pixels, heat_map
from nsa_lightning.evaluation.maps import check_layers, draw_selection, selection_maps, text_of_maps
from nsa_lightning.evaluation.method import OwnLayers
from nsa_lightning.evaluation.needle import NeedleConfig, NeedleTask
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.ruler import RULER_KINDS, RulerConfig, RulerTask
from nsa_lightning.evaluation.summary import Row, means
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.strategy import FSDP2Strategy

_Scored = tuple[int | None, float | None, dict[str, float]]
"""Length and depth of a case, and what its answer counted."""


class _EveryNSteps(Callback):
    """Measures something on the first rank after every so many optimizer steps, and logs it."""

    def __init__(self, setting: str, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise SettingError(f"{setting}.every_n_steps must be at least 1, got {every_n_steps}")
        self._setting, self.every_n_steps = setting, every_n_steps
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare what is asked.

        Raises:
            ValueError: the weights are shards, which are not gathered for this.
        """
        if isinstance(trainer.strategy, FSDP2Strategy):
            raise SettingError(
                f"{self._setting} must not be used with trainer.strategy=fsdp2, whose weights are shards; nsa evaluate "
                "reads its checkpoints"
            )
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PackedTextDataModule):
            raise SettingError(f"{self._setting} needs the tokenizer of the data, got {type(data).__name__}")
        assert isinstance(pl_module, LanguageModel)
        self._last_step = trainer.global_step
        self._prepare(data.tokenizer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, if the step is one of those."""
        assert isinstance(pl_module, LanguageModel)
        step = trainer.global_step
        if step % self.every_n_steps or step == self._last_step:  # a step may have several batches
            return
        self._last_step = step
        assert pl_module.model is not None
        with torch.autocast(pl_module.device.type, enabled=False):
            self._measure(trainer, pl_module.model)

    def _prepare(self, tokenizer: Tokenizer, module: LanguageModel) -> None:
        raise NotImplementedError

    def _measure(self, trainer: Trainer, model: Transformer) -> None:
        raise NotImplementedError


class EvaluateTasks(_EveryNSteps):
    """Ask the model a few cases of made tasks every so many steps.

    Scores and the likelihood of the right answers are logged as `evaluate/TASK/score/LENGTH` and
    `evaluate/TASK/log_probability/LENGTH`, with a picture of each needle task by length and depth in TensorBoard. The
    model answers with the weights that it has, in their own dtype.

    Args:
        every_n_steps: optimizer steps between two measurements.
        lengths: tokens of prompt and answer together; data.seq_len if not given.
        tasks: `needle` and `ruler`.
        needle: the needle task.
        ruler: the other tasks of RULER.
        batch_size: cases that are answered at once.

    Raises:
        ValueError: a value is out of range, or there is no such task.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        lengths: list[int] | None = None,
        tasks: list[str] = ["needle"],  # noqa: B006 (not changed)
        needle: NeedleConfig = NeedleConfig(depths=[0.0, 0.5, 1.0]),  # noqa: B008 (frozen)
        ruler: RulerConfig = RulerConfig(samples=2),  # noqa: B008 (frozen)
        batch_size: int = 4,
    ) -> None:
        check_arguments(EvaluateTasks.__init__, locals(), "evaluate_tasks.")
        super().__init__("evaluate_tasks", every_n_steps)
        unknown = sorted(set(tasks) - {"needle", "ruler"})
        if unknown or not tasks:
            raise SettingError(f"evaluate_tasks.tasks must be of needle, ruler, got {unknown or tasks}")
        if lengths is not None and (not lengths or min(lengths) < 1):
            raise SettingError(f"evaluate_tasks.lengths must be one or more numbers of at least 1, got {lengths}")
        if batch_size < 1:
            raise SettingError(f"evaluate_tasks.batch_size must be at least 1, got {batch_size}")
        self.lengths, self.tasks, self.needle, self.ruler = lengths, tasks, needle, ruler
        self.batch_size = batch_size
        self._tokenizer: Tokenizer | None = None
        self._asked: list[tuple[Task, list[Case], list[tuple[int | None, float | None]]]] = []

    def _prepare(self, tokenizer: Tokenizer, module: LanguageModel) -> None:
        """Make all cases, once."""
        seq_len = module.transformer_config.max_seq_len
        if self.lengths is None and seq_len is None:
            raise SettingError("evaluate_tasks.lengths must be given where data.seq_len is not, got none")
        lengths, form = self.lengths or [seq_len or 0], PromptForm(tokenizer)
        tasks: list[Task] = []
        if "needle" in self.tasks:
            tasks += [NeedleTask(family, self.needle, lengths, form) for family in dict.fromkeys(self.needle.families)]
        if "ruler" in self.tasks:
            tasks += [RulerTask(kind, self.ruler, lengths, form) for kind in RULER_KINDS]
        self._tokenizer, self._asked = tokenizer, []
        for task in tasks:
            planned = task.cases()
            places = [(case.length, case.depth) for case in planned]
            self._asked.append((task, [case.build() for case in planned], places))

    @rank_zero_only
    def _measure(self, trainer: Trainer, model: Transformer) -> None:
        assert self._tokenizer is not None
        ends = {self._tokenizer.end_of_text_id}
        answerer = Answerer(model, self._tokenizer, ends, OwnLayers(model.config), self.batch_size, cuda_graphs=False)
        scalars: dict[str, float] = {}
        for task, cases, places in self._asked:
            scores: list[_Scored] = [
                (*places[number], task.score(cases[number], answer))
                for number, answer in answerer.answers(cases, task.stop, task.sampling)
            ]
            scalars |= _scalars(task.name, scores)
            if task.name.startswith("needle"):
                picture = as_pixels(heat_map(_rows(task.name, scores), f"{task.name}, step {trainer.global_step}"))
                _add_image(trainer, f"evaluate/{task.name}", picture)
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step - 1)


class SelectionMaps(_EveryNSteps):
    """Draw which blocks of a text each query of every NSA layer chose, as a picture in TensorBoard.

    Args:
        text: a text file, of which the first tokens are shown; a made text with a needle if not given.
        every_n_steps: optimizer steps between two pictures.
        num_tokens: of the text; data.seq_len if not given.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, text: str | None = None, every_n_steps: int = 1000, num_tokens: int | None = None) -> None:
        check_arguments(SelectionMaps.__init__, locals(), "selection_maps.")
        super().__init__("selection_maps", every_n_steps)
        self.text, self.num_tokens = text, num_tokens
        self._tokens = torch.zeros(0, dtype=torch.int64)

    def _prepare(self, tokenizer: Tokenizer, module: LanguageModel) -> None:
        check_layers(module.transformer_config)
        length = self.num_tokens or module.transformer_config.max_seq_len or 0
        self._tokens = text_of_maps(self.text, length, PromptForm(tokenizer))

    @rank_zero_only
    def _measure(self, trainer: Trainer, model: Transformer) -> None:
        maps = selection_maps(model, self._tokens.to(model.output_embedding.device))
        title = f"Blocks that queries chose, {len(self._tokens)} tokens, step {trainer.global_step}"
        _add_image(trainer, "evaluate/selection", as_pixels(draw_selection(maps, title)))


def _scalars(task: str, scores: Sequence[_Scored]) -> dict[str, float]:
    """Means by length."""
    lengths: dict[int | None, list[dict[str, float]]] = {}
    for length, _, values in scores:
        lengths.setdefault(length, []).append(values)
    return {
        f"evaluate/{task}/{name}/{length}": value
        for length, found in lengths.items()
        for name, value in means(found).items()
    }


def _rows(task: str, scores: Sequence[_Scored]) -> list[Row]:
    """Means by length and depth, as pictures take them."""
    places: dict[tuple[int | None, float | None], list[dict[str, float]]] = {}
    for length, depth, values in scores:
        places.setdefault((length, depth), []).append(values)
    return [
        Row(method="model", task=task, length=length, depth=depth, cases=len(found), scores=means(found))
        for (length, depth), found in places.items()
    ]


def _add_image(trainer: Trainer, name: str, picture: Any) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, trainer.global_step - 1, dataformats="HWC")
