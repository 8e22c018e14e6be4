"""What the NSA layers do, in TensorBoard: gate scores by layer and branch, and how far back selection looks."""

from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from torch import Tensor

from nsa_lightning.model.statistics import NEAR, NUM_DISTANCE_BINS, NUM_GATE_BINS, BranchStatistics
from nsa_lightning.training.callbacks.gate_picture import draw_gates
from nsa_lightning.training.compat import accumulates
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.step import StepCallback, StepOutputs

BRANCHES = ("compressed", "selected", "sliding")

# H query heads, K numbers of all statistics of a layer.


class GateSummary(NamedTuple):
    """The statistics of one layer, divided out and on the host; branches in the order of BRANCHES."""

    mean: Tensor  # [H, 3]
    branch_mean: Tensor  # [3]
    std: Tensor  # [3], over tokens and heads
    near_zero: Tensor  # [3], share of scores below NEAR
    near_one: Tensor  # [3], share of scores above 1 - NEAR
    histogram: Tensor  # [3, NUM_GATE_BINS]
    sum: Tensor  # [3]
    square_sum: Tensor  # [3]
    distance: float  # tokens back to a freely chosen block, mean; NaN if none was chosen
    beyond_window: float  # share of freely chosen blocks outside the sliding window; NaN if none was chosen
    distance_histogram: Tensor  # [NUM_DISTANCE_BINS]


def summarise(statistics: BranchStatistics) -> GateSummary:
    """Divide the sums of one layer by their counts."""
    num_tokens, num_heads = statistics.num_tokens, len(statistics.gate_sum)
    count = num_tokens * num_heads
    total, square_total = statistics.gate_sum.sum(0), statistics.gate_square_sum.sum(0)
    mean = total / count
    near_bins = round(NEAR * NUM_GATE_BINS)
    chosen = statistics.distance_histogram.sum()
    return GateSummary(
        mean=statistics.gate_sum / num_tokens,
        branch_mean=mean,
        std=(square_total / count - mean.square()).clamp(min=0).sqrt(),
        near_zero=statistics.gate_histogram[:, :near_bins].sum(1) / count,
        near_one=statistics.gate_histogram[:, -near_bins:].sum(1) / count,
        histogram=statistics.gate_histogram,
        sum=total,
        square_sum=square_total,
        distance=float(statistics.distance_sum / chosen),
        beyond_window=float(statistics.beyond_window / chosen),
        distance_histogram=statistics.distance_histogram,
    )


class GateMonitor(StepCallback):
    """Log gate scores and selection distances of every NSA layer.

    Scalars and histograms are logged with the trainer's other metrics; all layers are gathered and reduced over
    the ranks in one tensor, in those steps only.

    Args:
        every_n_steps: optimizer steps between two logs; trainer.log_every_n_steps if not given.
        picture_every: logs between two pictures of all gates; 0 for none.
    """

    def __init__(self, every_n_steps: int | None = None, picture_every: int = 10) -> None:
        check_arguments(GateMonitor.__init__, locals(), "gate_monitor.")
        if every_n_steps is not None and every_n_steps < 1:
            raise SettingError(f"gate_monitor.every_n_steps must be at least 1, got {every_n_steps}")
        if picture_every < 0:
            raise SettingError(f"gate_monitor.picture_every must be at least 0, got {picture_every}")
        self.every_n_steps, self.picture_every = every_n_steps, picture_every
        self._num_logs = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask TensorBoard for one page with the three branches of all layers."""
        assert isinstance(pl_module, LanguageModel)
        kinds = pl_module.transformer_config.layer_kinds
        layers = [index for index, kind in enumerate(kinds) if kind.has_branches]
        self._num_logs = 0
        if layers:
            self._add_layout(trainer, layers)

    @rank_zero_only
    def _add_layout(self, trainer: Trainer, layers: list[int]) -> None:
        charts = {
            f"layer {index:02d}": ["Multiline", [f"{_tag('gate_mean', index)}/{branch}" for branch in BRANCHES]]
            for index in layers
        }
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars({"Mean gate of each branch, by layer": charts})

    def watches_attention(self, trainer: Trainer) -> bool:
        """Whether the step is one that is logged."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and bool(trainer.loggers) and (trainer.global_step + 1) % every == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Reduce what was watched over the ranks and log it."""
        step: StepOutputs = outputs
        watched = step["statistics"]
        if not watched or accumulates(trainer):
            return
        rows = torch.stack([torch.cat([part.flatten() for part in layer]) for layer in watched.values()])  # [layers, K]
        rows = trainer.strategy.reduce(rows, reduce_op="sum").cpu()
        shapes = [part.shape for part in next(iter(watched.values()))]
        summaries = {}
        for index, row in zip(watched, rows, strict=True):
            parts = row.split([shape.numel() for shape in shapes])
            unpacked = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            summaries[index] = summarise(BranchStatistics(*unpacked))
        self._log(trainer, summaries)

    @rank_zero_only
    def _log(self, trainer: Trainer, summaries: dict[int, GateSummary]) -> None:
        step = trainer.global_step - 1  # the step that was watched, as train/loss counts it
        scalars: dict[str, float] = {}
        for index, summary in summaries.items():
            for name, values in (
                ("gate_mean", summary.branch_mean),
                ("gate_std", summary.std),
                ("gate_near_zero", summary.near_zero),
                ("gate_near_one", summary.near_one),
            ):
                scalars |= {
                    f"{_tag(name, index)}/{branch}": float(value)
                    for branch, value in zip(BRANCHES, values, strict=True)
                }
            if summary.distance == summary.distance:  # some block was chosen freely
                scalars[_tag("selection_distance_tokens", index)] = summary.distance
                scalars[_tag("selection_beyond_window", index)] = summary.beyond_window
        draw = self.picture_every > 0 and self._num_logs % self.picture_every == 0
        self._num_logs += 1
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=step)
            if isinstance(logger, TensorBoardLogger):
                _log_histograms(logger, summaries, step)
                if draw:
                    means = {index: summary.mean for index, summary in summaries.items()}
                    picture = draw_gates(means, BRANCHES, f"Mean gate score, step {step}")
                    logger.experiment.add_image("gates", picture, step, dataformats="HWC")


def _tag(name: str, layer: int) -> str:
    return f"{name}/layer_{layer:02d}"


def _log_histograms(logger: TensorBoardLogger, summaries: dict[int, GateSummary], step: int) -> None:
    """Gate scores by branch, and log2 of the distance to freely chosen blocks."""
    gate_limits = [(i + 1) / NUM_GATE_BINS for i in range(NUM_GATE_BINS)]
    distance_limits = [float(i + 1) for i in range(NUM_DISTANCE_BINS)]
    for index, summary in summaries.items():
        for i, branch in enumerate(BRANCHES):
            logger.experiment.add_histogram_raw(
                f"{_tag('gate', index)}/{branch}",
                min=0.0,
                max=1.0,
                num=float(summary.histogram[i].sum()),
                sum=float(summary.sum[i]),
                sum_squares=float(summary.square_sum[i]),
                bucket_limits=gate_limits,
                bucket_counts=summary.histogram[i].tolist(),
                global_step=step,
            )
        counts, middles = summary.distance_histogram, torch.arange(NUM_DISTANCE_BINS) + 0.5
        logger.experiment.add_histogram_raw(
            _tag("selection_distance_log2_tokens", index),
            min=0.0,
            max=float(NUM_DISTANCE_BINS),
            num=float(counts.sum()),
            sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles.square()).sum()),
            bucket_limits=distance_limits,
            bucket_counts=counts.tolist(),
            global_step=step,
        )
