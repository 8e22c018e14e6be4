"""Time of a call, peak memory and the rates of the device."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

_Result = TypeVar("_Result")

_MATMUL_SIZE = {"cuda": 8192}
_COPY_BYTES = {"cuda": 2**31}
_OTHER_MATMUL_SIZE, _OTHER_COPY_BYTES = 512, 2**25
_MOST_REPETITIONS = 200
_FLUSHED_CACHES = 4  # sizes of the L2 cache that a flush reads


class Timing(NamedTuple):
    """A measured time."""

    ms: float
    """Median of the repetitions."""

    repetitions: int


class Clock(NamedTuple):
    """How calls are timed: CUDA events on a GPU, the process's clock elsewhere."""

    device: torch.device
    time_budget: float
    """Seconds that the repetitions of one measurement may take."""

    repetitions: int
    """The fewest repetitions, whatever they take."""

    def measure(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> Timing:
        """Median time of `call`, whose result is dropped; two calls before warm up. `before` precedes each, untimed."""
        before()
        call()
        before()
        self._wait()
        start = time.perf_counter()
        call()
        self._wait()
        estimate = max(time.perf_counter() - start, 1e-6)
        repetitions = max(self.repetitions, min(int(self.time_budget / estimate), _MOST_REPETITIONS))
        timed = self._events if self.device.type == "cuda" else _seconds
        times = timed(call, before, repetitions)
        return Timing(statistics.median(times), repetitions)

    def _events(self, call: Callable[[], object], before: Callable[[], object], repetitions: int) -> list[float]:
        """Milliseconds between events on the stream: the host queues all calls and waits once."""
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)
        ]
        for start, end in events:
            before()
            start.record()
            call()
            end.record()
        self._wait()
        return [float(start.elapsed_time(end)) for start, end in events]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _seconds(call: Callable[[], object], before: Callable[[], object], repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        before()
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def within_memory(call: Callable[[], _Result]) -> tuple[_Result | None, str | None]:
    """The result of `call`, or None and the reason if the device has not enough memory for it."""
    try:
        return call(), None
    except torch.OutOfMemoryError as error:
        reason = first_line(error)
    release_memory()  # here, where the failed call's frames are gone
    return None, reason


def if_supported(call: Callable[[], _Result]) -> tuple[_Result | None, str | None]:
    """The result of `call`, or None and the reason if it fails: for implementations that are not ours.

    PyTorch says in a warning why a kernel was refused; that becomes part of the reason.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return call(), None
        except Exception as error:
            reason = first_line(error)
    release_memory()
    details = [first_line(warning.message) for warning in said]
    return None, " ".join([reason, *dict.fromkeys(text for text in details if "not used because" not in text)])


def first_line(error: BaseException | str) -> str:
    """What went wrong, without the advice that follows."""
    line = str(error).strip().split("\n")[0] or type(error).__name__
    return line.split(" (Triggered internally")[0].split(". This could be")[0][:200]


def cache_flush(device: torch.device) -> Callable[[], object]:
    """What to run so that a GPU's L2 cache holds nothing of what was read before; nothing elsewhere."""
    if device.type != "cuda":
        return lambda: None
    num_bytes = _FLUSHED_CACHES * torch.cuda.get_device_properties(device).L2_cache_size
    filler = torch.zeros(num_bytes // 4, device=device)
    return filler.sum


def release_memory() -> None:
    """Hand cached device memory back, so that one measurement does not starve the next."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def peak_gib(call: Callable[[], object], device: torch.device) -> float | None:
    """Most device memory held while `call` runs, what was there before included; None where it is not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return float(torch.cuda.max_memory_allocated(device)) / 2**30


class Ceilings(NamedTuple):
    """What the device reaches at best."""

    matmul_flops: float
    """FLOPs a second of a large square matrix product."""

    copy_bytes: float
    """Bytes a second of a large copy, read and written bytes counted."""


def measure_ceilings(dtype: torch.dtype, clock: Clock) -> Ceilings:
    """Time a product of 8192³ and a copy of 2 GiB; less on a CPU."""
    kind, device = clock.device.type, clock.device
    size = _MATMUL_SIZE.get(kind, _OTHER_MATMUL_SIZE)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    matmul = clock.measure(lambda: torch.mm(a, b, out=product))
    num_bytes = _COPY_BYTES.get(kind, _OTHER_COPY_BYTES)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = clock.measure(lambda: target.copy_(source))
    return Ceilings(2e3 * size**3 / matmul.ms, 2e3 * num_bytes / copy.ms)
