"""One token of each sequence through one attention layer: NSA, and full attention of the same cache.

The cache holds normal numbers, so every KV head of every sequence chooses blocks of its own. All sequences are equally
long. A CUDA graph is replayed after the L2 cache has been emptied, as the other layers of a model would; launches of
Python follow each other, since an emptying between them would hide the time in which the host prepares them.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from nsa_kernels import NSAConfig, plan
from nsa_kernels.backends import Backend
from nsa_kernels.decode.attention import LayerCache, decode_attention, decode_dense_attention
from torch import Tensor

from nsa_lightning.benchmark.cases import Shape
from nsa_lightning.benchmark.decode_records import DecodeCase, DecodeRecord
from nsa_lightning.benchmark.floors import Work, floor_ms
from nsa_lightning.benchmark.rivals import RIVALS, Rival, attend_one_token, pinned
from nsa_lightning.benchmark.timing import Ceilings, Clock, if_supported, release_memory, within_memory
from nsa_lightning.generation.cuda_graphs import capture
from nsa_lightning.generation.device import free_memory
from nsa_lightning.model.attention.pairs import num_summaries

# B sequences, S, W and C slots of a cache, H query heads, H_kv KV heads, D_qk and D_v head dims, L tokens so far.

Sharing = Literal["separate", "shared"]
SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
OWN_FULL = "dense"
"""Our own kernels of full attention, which `full` layers of a model decode with."""


class DecodeBench(NamedTuple):
    """What all measurements of a run share."""

    backend: Backend
    config: NSAConfig
    dtype: torch.dtype
    clock: Clock
    ceilings: Ceilings
    flush: Callable[[], object]
    """Empties the L2 cache."""


class StepInputs(NamedTuple):
    """What one layer reads for a new token of each sequence."""

    q: Tensor  # [B, H, D_qk]
    gates: Tensor  # [B, H, 3]
    positions: Tensor  # int32 [B]
    separate: LayerCache  # with a ring for the sliding branch

    def cache(self, sharing: Sharing) -> LayerCache:
        """With a ring of its own for the sliding branch, or on the keys and values of the selected one."""
        k, v = self.separate[:2]
        return self.separate if sharing == "separate" else self.separate._replace(sliding_k=k, sliding_v=v)


def _sizes(shape: Shape, batch_size: int, length: int, config: NSAConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a LayerCache with room for `length` tokens."""
    slots = -(-length // config.select_block_size) * config.select_block_size
    rows = {"": slots, "sliding_": config.window_size, "summary_": slots // config.compress_stride}
    dims = {"k": shape.qk_dim, "v": shape.v_dim}
    return {
        branch + name: (batch_size, size, shape.num_kv_heads, dim)
        for branch, size in rows.items()
        for name, dim in dims.items()
    }


def cache_bytes(shape: Shape, batch_size: int, length: int, config: NSAConfig, dtype: torch.dtype) -> int:
    """Memory of the cache."""
    return sum(torch.Size(size).numel() for size in _sizes(shape, batch_size, length, config).values()) * dtype.itemsize


def missing_memory(num_bytes: int, device: torch.device) -> str | None:
    """Why a cache does not fit, before anything is allocated; None where it does."""
    release_memory()
    free = free_memory(device)
    return f"the cache takes {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free" if num_bytes > free else None


def make_step(
    shape: Shape, lengths: list[int], config: NSAConfig, dtype: torch.dtype, device: torch.device
) -> StepInputs:
    """Draw the inputs of a step; the same arguments give the same numbers.

    Args:
        shape: heads and head dimensions.
        lengths: tokens of each sequence, the new one included.
        config: block sizes and counts.
        dtype: of q, gates and the cache.
        device: where they are drawn.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    B = len(lengths)
    cache = {name: normal(*size) for name, size in _sizes(shape, B, max(lengths), config).items()}
    positions = torch.tensor(lengths, dtype=torch.int32, device=device) - 1
    q, gates = normal(B, shape.num_heads, shape.qk_dim), normal(B, shape.num_heads, 3).sigmoid()
    return StepInputs(q, gates, positions, LayerCache(**cache))


def step_bytes(shape: Shape, case: DecodeCase, config: NSAConfig, full: bool, element_size: int) -> int:
    """Queries, gates, output, and the keys and values that must be read: of every token, or once for each branch."""
    length, size = case.context, config.select_block_size
    own, inside = divmod(length - 1, size)
    chosen = min(own, config.num_selected_blocks - 1) * size + inside + 1
    branches = int(num_summaries(config, np.array(length))) + chosen + min(length, config.window_size)
    keys = shape.num_kv_heads * (length if full else branches)
    gates = 0 if full else 3 * shape.num_heads
    dims = shape.qk_dim + shape.v_dim
    return case.batch_size * element_size * ((keys + shape.num_heads) * dims + gates)


def measure_layer(
    bench: DecodeBench, case: DecodeCase, shape: Shape, unusable: dict[Rival, str] | None
) -> Iterator[DecodeRecord]:
    """Time NSA with separate and shared keys, and full attention; a cache that does not fit is one record.

    Args:
        bench: what measurements share.
        case: batch size and context.
        shape: heads and head dimensions.
        unusable: rivals that are left out, and why; None: all full attention is left out.
    """
    empty = DecodeRecord(case=case, method=f"nsa {SHARINGS[0]}", full=False)
    device, needed = bench.clock.device, cache_bytes(shape, case.batch_size, case.context, bench.config, bench.dtype)
    reason = missing_memory(needed, device)
    if reason is not None:
        yield replace(empty, reason=reason)
        return
    lengths = [case.context] * case.batch_size
    inputs, reason = within_memory(lambda: make_step(shape, lengths, bench.config, bench.dtype, device))
    if inputs is None:
        yield replace(empty, reason=reason)
        return
    chosen = plan(inputs.q, inputs.separate.v, bench.config, bench.backend)
    empty = _with_floor(bench, shape, replace(empty, implementation=chosen.stages.decoding))
    for sharing in SHARINGS:
        cache = inputs.cache(sharing)
        step = partial(
            decode_attention, inputs.q, inputs.gates, cache, inputs.positions, bench.config, backend=bench.backend
        )
        yield timed(bench, replace(empty, method=f"nsa {sharing}"), step, within_memory)
    if unusable is not None:
        yield from _measure_full(bench, case, shape, inputs, unusable)


def _measure_full(
    bench: DecodeBench, case: DecodeCase, shape: Shape, inputs: StepInputs, unusable: dict[Rival, str]
) -> Iterator[DecodeRecord]:
    """The rivals read the same memory as if it were laid out as they like it best, head by head."""
    q, (k, v) = inputs.q, inputs.separate[:2]
    empty = _with_floor(bench, shape, DecodeRecord(case=case, method=OWN_FULL, full=True))
    yield timed(
        bench, empty, partial(decode_dense_attention, q, k, v, inputs.positions, backend=bench.backend), within_memory
    )
    by_head = (x.view(len(x), x.shape[2], x.shape[1], x.shape[3])[:, :, : case.context] for x in (k, v))
    step = partial(attend_one_token, q, *by_head)
    for rival in RIVALS:
        record = replace(empty, method=rival, reason=unusable.get(rival))
        if record.reason is None:
            with pinned(rival):
                record = timed(bench, record, step, if_supported)
        yield record


def _with_floor(bench: DecodeBench, shape: Shape, record: DecodeRecord) -> DecodeRecord:
    num_bytes = step_bytes(shape, record.case, bench.config, record.full, bench.dtype.itemsize)
    return replace(record, num_bytes=num_bytes, floor_ms=floor_ms(Work(0, num_bytes), bench.ceilings))


def timed(
    bench: DecodeBench,
    record: DecodeRecord,
    step: Callable[[], object],
    attempt: Callable[[Callable[[], Any]], tuple[Any, str | None]],
) -> DecodeRecord:
    """The record with its times, launched by Python and as a CUDA graph, or with the reason why they are missing."""
    eager, reason = attempt(lambda: bench.clock.measure(step))
    if eager is None:
        return replace(record, reason=reason)
    record = replace(record, eager_ms=eager.ms)
    if bench.clock.device.type != "cuda":
        return record
    graph, reason = attempt(lambda: bench.clock.measure(capture(step).replay, bench.flush))
    return replace(record, graph_ms=graph.ms) if graph else replace(record, reason=f"CUDA graph: {reason}")
