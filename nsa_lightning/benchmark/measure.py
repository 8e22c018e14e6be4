"""Time one case: NSA whole and by stage, and full attention on the same inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from nsa_kernels import NSAConfig, Plan, native_sparse_attention, plan
from nsa_kernels.backends import Backend
from nsa_kernels.packing import BatchLayout, batch_layout
from torch import Tensor

from nsa_lightning.benchmark.floors import StageWork, count_pairs, floor_ms, stage_work
from nsa_lightning.benchmark.inputs import Inputs, neighbour_union
from nsa_lightning.benchmark.results import REST, Case, Record
from nsa_lightning.benchmark.rivals import Rival, full_attention
from nsa_lightning.benchmark.stages import GRADIENTS, JOINT, branch_sum, stage_functions
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
    chosen = plan(inputs.q, inputs.v, config, bench.backend)
    empty = Record(case=case, method="nsa", implementation=chosen.backend, unions=unions)
    timed = _timed(empty, lambda: (operator()[0],), inputs.leaves(), bench)
    floors = {name: _floors(stage, bench.ceilings) for name, stage in work.items()}
    whole = replace(
        timed,
        forward_floor_ms=sum(forward for forward, _ in floors.values()),
        backward_floor_ms=sum(backward or 0.0 for _, backward in floors.values()),
    )
    yield whole
    if by_stage:
        calls, reason = within_memory(lambda: _stage_calls(chosen, config, inputs, blocks, layout))
        if calls is None:
            yield Record(case=case, method="nsa", stage="stages", reason=reason)
        else:
            yield from _measure_stages(bench, whole, chosen, calls, _divided(floors, chosen))


def _floors(stage: StageWork, ceilings: Ceilings) -> tuple[float, float | None]:
    return floor_ms(stage.forward, ceilings), stage.backward and floor_ms(stage.backward, ceilings)


_Floors = Mapping[str, tuple[float | None, float | None]]


def _divided(floors: Mapping[str, tuple[float, float | None]], chosen: Plan) -> _Floors:
    """Forward and backward floor of each stage that a plan has; on kernels one backward stands for all branches'."""
    if chosen.backend != "triton":
        return floors
    joined = ("compressed_attention", "selected_attention", "sliding_attention", "gates")
    backward = sum(floors[name][1] or 0.0 for name in joined)
    alone = {name: (floors[name][0], None) for name in joined}
    return {**floors, **alone, JOINT: (None, backward)}


def _measure_stages(
    bench: Bench, whole: Record, chosen: Plan, calls: Mapping[str, _Call], floors: _Floors
) -> Iterator[Record]:
    records = []
    for name, call in calls.items():
        forward, backward = floors[name]
        empty = Record(case=whole.case, method="nsa", stage=name, forward_floor_ms=forward, backward_floor_ms=backward)
        names = GRADIENTS if name == JOINT else (name,)
        implementations = dict.fromkeys(getattr(chosen.stages, stage) for stage in names)
        record = _timed(replace(empty, implementation=", ".join(implementations)), call.forward, call.leaves, bench)
        records.append(record if forward else replace(record, forward_ms=None, forward_repetitions=0))
        yield records[-1]
    forward, backward = floors["gates"]
    yield Record(
        case=whole.case,
        method="nsa",
        stage=REST,
        forward_ms=_less(whole.forward_ms, [record.forward_ms for record in records if record.forward_floor_ms]),
        backward_ms=_less(whole.backward_ms, [record.backward_ms for record in records if record.backward_floor_ms]),
        forward_floor_ms=forward,
        backward_floor_ms=backward,
    )


def _less(total: float | None, parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return total - sum(known) if total is not None and len(known) == len(parts) else None


def _stage_calls(
    chosen: Plan, config: NSAConfig, inputs: Inputs, blocks: Tensor, layout: BatchLayout
) -> dict[str, _Call]:
    """Each stage by name, on summaries and log-sum-exp computed once."""
    q, k, v, gates, cu = inputs
    stages, joint = stage_functions(chosen, cu, config, layout), chosen.backend == "triton"
    with torch.no_grad():
        ck, cv = stages.compress(k), stages.compress(v)
        lse = stages.compressed_attention(q, ck, cv)[1]
    ck, cv = ck.requires_grad_(), cv.requires_grad_()

    def attention(function: Callable[..., tuple[Tensor, Tensor]], q: Tensor, *keys: Tensor) -> _Call:
        return _Call(lambda: function(q, *keys)[:1], () if joint else (q, *keys[:2]))

    calls = {
        "compress": _Call(lambda: (stages.compress(k), stages.compress(v)), (k, v)),
        "compressed_attention": attention(stages.compressed_attention, q, ck, cv),
        "block_selection": _Call(lambda: (stages.block_selection(q, ck, lse),), ()),
        "selected_attention": attention(stages.selected_attention, q, k, v, blocks),
        "sliding_attention": attention(stages.sliding_attention, q, k, v),
    }
    if joint:
        summed = branch_sum(chosen.stages, inputs, ck, cv, blocks, config, layout)
        calls[JOINT] = _Call(lambda: (summed(),), (q, k, v, ck, cv, gates))
    return calls


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
