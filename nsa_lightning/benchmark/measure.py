"""Time one case: NSA whole and by stage, and full attention on the same inputs."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from nsa_kernels import NSAConfig, native_sparse_attention
from nsa_kernels.attention import Backend, stages_of
from nsa_kernels.packing import BatchLayout, batch_layout
from torch import Tensor

from nsa_lightning.benchmark.floors import StageWork, count_pairs, floor_ms, stage_work
from nsa_lightning.benchmark.inputs import Inputs, neighbour_union
from nsa_lightning.benchmark.results import REST, Case, Record
from nsa_lightning.benchmark.rivals import Rival, full_attention
from nsa_lightning.benchmark.timing import (
    Ceilings,
    Clock,
    Timing,
    if_supported,
    peak_gib,
    release_memory,
    within_memory,
)

NEIGHBOURS = (2, 4, 8, 16)

_STAGES = ("compress", "compressed_attention", "block_selection", "selected_attention", "sliding_attention")

# T packed tokens, N documents, H query heads, H_kv KV heads, D_qk and D_v head dims, C compressed blocks.

_Attempt = Callable[[Callable[[], Any]], tuple[Any, str | None]]


class Bench(NamedTuple):
    """What all measurements of a run share."""

    backend: Backend
    config: NSAConfig
    clock: Clock
    ceilings: Ceilings


class _Call(NamedTuple):
    """Something to time: a forward pass, and what its outputs are differentiated by (nothing: forward only)."""

    forward: Callable[[], tuple[Tensor, ...]]
    leaves: tuple[Tensor, ...]


def measure_nsa(bench: Bench, case: Case, inputs: Inputs, by_stage: bool) -> Iterator[Record]:
    """Time the operator, then if wanted its stages, which read the blocks that the operator chose."""
    config, cu = bench.config, inputs.cu_seqlens
    layout = batch_layout(cu, len(inputs.q), config)  # a model makes it once for all its layers

    def operator() -> tuple[Tensor, Tensor]:
        return native_sparse_attention(*inputs.leaves(), cu, config, layout=layout, backend=bench.backend)

    with torch.no_grad():
        blocks, reason = within_memory(lambda: operator()[1])
    if blocks is None:
        yield Record(case=case, method="nsa", reason=reason)
        return
    pairs = count_pairs(case.shape, case.lengths, blocks, cu, config)
    work = stage_work(case.shape, case.lengths, pairs, config, inputs.q.element_size())
    unions = {m: neighbour_union(blocks, m, cu, config) for m in NEIGHBOURS}
    implementation = stages_of(bench.backend, inputs.q, inputs.v, config).__name__
    empty = Record(case=case, method="nsa", implementation=implementation, unions=unions)
    timed = _timed(empty, lambda: (operator()[0],), inputs.leaves(), bench)
    floors = {name: _floors(stage, bench.ceilings) for name, stage in work.items()}
    whole = replace(
        timed,
        forward_floor_ms=sum(forward for forward, _ in floors.values()),
        backward_floor_ms=sum(backward or 0.0 for _, backward in floors.values()),
    )
    yield whole
    if by_stage:
        yield from _measure_stages(bench, whole, inputs, blocks, layout, floors)


def _floors(stage: StageWork, ceilings: Ceilings) -> tuple[float, float | None]:
    return floor_ms(stage.forward, ceilings), stage.backward and floor_ms(stage.backward, ceilings)


def _measure_stages(
    bench: Bench,
    whole: Record,
    inputs: Inputs,
    blocks: Tensor,
    layout: BatchLayout,
    floors: Mapping[str, tuple[float, float | None]],
) -> Iterator[Record]:
    calls, reason = within_memory(lambda: _stage_calls(bench, inputs, blocks, layout))
    if calls is None:
        yield Record(case=whole.case, method="nsa", stage="stages", reason=reason)
        return
    records = []
    for name, call in calls.items():
        forward, backward = floors[name]
        empty = Record(case=whole.case, method="nsa", stage=name, forward_floor_ms=forward, backward_floor_ms=backward)
        records.append(_timed(empty, call.forward, call.leaves, bench))
        yield records[-1]
    forward, backward = floors["gates"]
    yield Record(
        case=whole.case,
        method="nsa",
        stage=REST,
        forward_ms=_less(whole.forward_ms, [record.forward_ms for record in records]),
        backward_ms=_less(whole.backward_ms, [record.backward_ms for record in records if record.backward_floor_ms]),
        forward_floor_ms=forward,
        backward_floor_ms=backward,
    )


def _less(total: float | None, parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return total - sum(known) if total is not None and len(known) == len(parts) else None


def _stage_calls(bench: Bench, inputs: Inputs, blocks: Tensor, layout: BatchLayout) -> dict[str, _Call]:
    """Each stage by name, on summaries and log-sum-exp computed once."""
    (q, k, v, _, cu), config = inputs, bench.config
    stages = _with_layout(stages_of(bench.backend, q, v, config), layout)
    with torch.no_grad():
        ck, cv = stages.compress(k, cu, config), stages.compress(v, cu, config)
        lse = stages.compressed_attention(q, ck, cv, cu, config)[1]
    ck, cv = ck.requires_grad_(), cv.requires_grad_()
    return {
        "compress": _Call(lambda: (stages.compress(k, cu, config), stages.compress(v, cu, config)), (k, v)),
        "compressed_attention": _Call(lambda: stages.compressed_attention(q, ck, cv, cu, config)[:1], (q, ck, cv)),
        "block_selection": _Call(lambda: (stages.block_selection(q, ck, lse, cu, config),), ()),
        "selected_attention": _Call(lambda: stages.selected_attention(q, k, v, blocks, cu, config)[:1], (q, k, v)),
        "sliding_attention": _Call(lambda: stages.sliding_attention(q, k, v, cu, config.window_size)[:1], (q, k, v)),
    }


def _with_layout(stages: ModuleType, layout: BatchLayout) -> SimpleNamespace:
    """The stages, those that take a layout with it."""
    functions = {name: getattr(stages, name) for name in _STAGES}
    takes = {name for name, function in functions.items() if "layout" in inspect.signature(function).parameters}
    return SimpleNamespace(
        **{
            name: partial(function, layout=layout) if name in takes else function
            for name, function in functions.items()
        }
    )


def measure_rival(bench: Bench, case: Case, inputs: Inputs, rival: Rival) -> Record:
    """Time PyTorch's full attention; what it does not support is recorded with PyTorch's reason."""
    attention = full_attention(rival, case.lengths, inputs.cu_seqlens)
    q, k, v, _, _ = inputs
    empty = Record(case=case, method=rival)
    return _timed(empty, lambda: (attention(q, k, v),), (q, k, v), bench, if_supported)


def _timed(
    record: Record,
    forward: Callable[[], tuple[Tensor, ...]],
    leaves: tuple[Tensor, ...],
    bench: Bench,
    attempt: _Attempt = within_memory,
) -> Record:
    """The record with its times and peak memory, or with the reason why they are missing."""
    release_memory()
    clock = bench.clock
    with torch.set_grad_enabled(bool(leaves)):
        timing, reason = attempt(lambda: clock.measure(forward))
    if timing is None:
        return replace(record, reason=reason)
    record = replace(record, forward_ms=timing.ms, forward_repetitions=timing.repetitions)
    if not leaves:
        return record
    backward, reason = attempt(lambda: _time_backward(forward, leaves, clock))
    if backward is None:
        return replace(record, reason=f"backward: {reason}")
    record = replace(record, backward_ms=backward.ms, backward_repetitions=backward.repetitions)
    release_memory()
    peak, _ = attempt(lambda: peak_gib(lambda: _forward_backward(forward, leaves), clock.device))
    return replace(record, peak_gib=peak)


def _time_backward(forward: Callable[[], tuple[Tensor, ...]], leaves: tuple[Tensor, ...], clock: Clock) -> Timing:
    """Time of backward alone, on a graph built once and kept."""
    outputs = forward()
    grads = [torch.randn_like(output) for output in outputs]
    return clock.measure(lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True))


def _forward_backward(forward: Callable[[], tuple[Tensor, ...]], leaves: tuple[Tensor, ...]) -> None:
    outputs = forward()
    torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
