"""What one process of `nsa bench training` measures: steps of training on random tokens, timed."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset

from nsa_lightning.benchmark.cases import DocumentMix, document_lengths
from nsa_lightning.benchmark.compat import profiled_events
from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch

_PROFILED_STEPS = 2

Interval = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What is measured of a run, as `nsa bench training` tells its processes."""

    steps: int
    warmup_steps: int
    result: Path
    documents: DocumentMix = "one"
    profile: bool = False

    @property
    def all_steps(self) -> int:
        """Steps of the run."""
        return self.warmup_steps + self.steps + (_PROFILED_STEPS if self.profile else 0)


@dataclass(frozen=True, kw_only=True)
class StepMeasurement:
    """A step of the optimizer, as rank 0 saw it."""

    world_size: int
    ranks_a_batch: int
    tokens: int
    """Of all ranks."""
    step_ms: float
    """Median."""
    mean_step_ms: float
    mfu: float | None
    """None where Lightning does not know the device's peak."""
    peak_bytes: int | None
    """Most that PyTorch's allocator handed out on any GPU; None where it is not counted."""
    nccl_alone: float | None
    """Share of the time in which rank 0's GPU ran kernels of NCCL and no others; None if not profiled."""
    environment: dict[str, Any]


class RandomBatches(Dataset[PackedBatch]):
    """Random tokens in documents of given lengths; every process makes the same ones."""

    def __init__(self, vocab_size: int, lengths: Sequence[int], count: int) -> None:
        self.vocab_size, self.lengths, self.count = vocab_size, torch.tensor(lengths), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PackedBatch:
        ends = self.lengths.cumsum(0)
        total = int(ends[-1])
        tokens = torch.randint(self.vocab_size, (total,), generator=torch.Generator().manual_seed(index))
        targets = tokens.roll(-1).index_fill(0, ends - 1, IGNORE_INDEX)
        positions = torch.arange(total) - (ends - self.lengths).repeat_interleave(self.lengths)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
        return PackedBatch(tokens, targets, positions, cu_seqlens, int(self.lengths.max()), torch.tensor(total))


def random_loader(settings: StepSettings, vocab_size: int, seq_len: int, batch_size: int, batches: int) -> DataLoader:  # type: ignore[type-arg]
    """Batches of a run; each of their sequences has the same documents."""
    lengths = document_lengths(settings.documents, seq_len) * batch_size
    return DataLoader(RandomBatches(vocab_size, lengths, batches), None, pin_memory=torch.cuda.is_available())


class StepTimes(NamedTuple):
    """Of the measured steps on this rank."""

    median_ms: float
    mean_ms: float
    peak_bytes: int | None
    nccl_alone: float | None


class StepTimer:
    """Times the steps after warm-up; the device is waited for where they begin and where they end, not in between."""

    def __init__(self, settings: StepSettings) -> None:
        self.settings = settings
        self._marks: list[Any] = []
        self._peak: int | None = None
        kinds = [ProfilerActivity.CUDA] if torch.cuda.is_available() else None
        self._profile = profile(activities=kinds) if settings.profile else None

    def end_step(self, number: int, device: torch.device) -> None:
        """Mark the end of a step of the optimizer.

        Args:
            number: of the step, from 1 on, those of the warm-up included.
            device: that computes it.
        """
        step = number - self.settings.warmup_steps
        if step == 0:
            _wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        if 0 <= step <= self.settings.steps:
            self._marks.append(_mark(device))
        if step == self.settings.steps:
            _wait(device)
            self._peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
            if self._profile is not None:
                self._profile.start()

    def finish(self, device: torch.device) -> StepTimes:
        """What was measured, once all steps have ended."""
        _wait(device)
        if self._profile is not None:
            self._profile.stop()
        milliseconds = [_elapsed(*pair) for pair in zip(self._marks, self._marks[1:], strict=False)]
        alone = nccl_alone(_kernels(self._profile)) if self._profile is not None else None
        return StepTimes(statistics.median(milliseconds), statistics.mean(milliseconds), self._peak, alone)


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    """Milliseconds."""
    return 1e3 * (end - start) if isinstance(start, float) else float(start.elapsed_time(end))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _kernels(profiled: profile) -> list[tuple[str, Interval]]:
    """Name, start and end of what ran on the GPU, in nanoseconds."""
    return profiled_events(profiled, DeviceType.CUDA)


def nccl_alone(kernels: Sequence[tuple[str, Interval]]) -> float | None:
    """Share of the time from the first kernel to the last in which only kernels of NCCL ran; None without kernels."""
    if not kernels:
        return None
    spans = [interval for _, interval in kernels]
    others = [interval for name, interval in kernels if not name.startswith("nccl")]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return (_covered(spans) - _covered(others)) / whole


def _covered(intervals: Sequence[Interval]) -> int:
    """Length of the union."""
    covered = reached = 0
    for start, end in sorted(intervals):
        covered += max(end - max(start, reached), 0)
        reached = max(reached, end)
    return covered
