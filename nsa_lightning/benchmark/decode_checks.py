"""Are the kernels of a step right? Each beside the eager backend in float32, on sequences of different lengths.

The output is compared wherever both choose the same blocks; a row whose choice differs passes if the blocks it took are
as important as those it left, within the same bound.
"""

from collections.abc import Iterator
from itertools import starmap

import torch
from nsa_kernels import NSAConfig
from nsa_kernels.backends import Backend
from nsa_kernels.decode.attention import LayerCache, NewTokens, append_tokens, decode_attention, decode_dense_attention
from nsa_kernels.packing import compressed_layout
from torch import Tensor

from nsa_lightning.benchmark.cases import Shape
from nsa_lightning.benchmark.checks import BOUNDS, Check, Task, relative_error, selection_gap
from nsa_lightning.benchmark.decode_layer import SHARINGS, StepInputs, make_step
from nsa_lightning.benchmark.rivals import RIVALS, Rival, attend_one_token, pinned
from nsa_lightning.benchmark.timing import if_supported

# B sequences, L tokens of one, H query heads, H_kv KV heads, G = H / H_kv, D head dim, C summaries, n chosen blocks.

_RIVAL_LENGTHS = [777] * 3


def check_decode(task: Task) -> Iterator[Check]:
    """Compare the kernels of a step; `task.lengths` are the tokens of each sequence, the new one included."""
    shape, config, bound, backend = task.shape, task.config, BOUNDS[task.dtype], task.backend
    x = make_step(shape, task.lengths, config, task.dtype, task.device)
    yield Check(shape.name, "append_tokens", _append_error(task, x), None, bound)
    for sharing in SHARINGS:
        cache = x.cache(sharing)
        actual = decode_attention(x.q, x.gates, cache, x.positions, config, backend=backend)
        exact = LayerCache(*(part.float() for part in cache))
        expected = decode_attention(x.q.float(), x.gates.float(), exact, x.positions, config, backend="eager")
        alike = (actual.block_indices == expected.block_indices).all(-1)  # [B, H_kv]
        rows = (out.unflatten(1, (shape.num_kv_heads, -1))[alike] for out in (actual.out, expected.out))
        error = _worst_error(*rows) if alike.any() else float("inf")
        yield Check(shape.name, f"decode_attention, {sharing} keys", error, None, bound)
        gap = choice_gap(x, actual.block_indices, expected.block_indices, config)
        note = f"{1 - alike.float().mean().item():.2%} of rows differ; error: importance gap"
        yield Check(shape.name, f"its blocks, {sharing} keys", gap, None, bound, note)
    for window, k, v in ((None, *x.separate[:2]), (config.window_size, *x.separate[2:4])):
        out = decode_dense_attention(x.q, k, v, x.positions, window, backend=backend)
        truth = decode_dense_attention(x.q.float(), k.float(), v.float(), x.positions, window, backend="eager")
        name = "decode_dense_attention" + ("" if window is None else f", window {window}")
        yield Check(shape.name, name, _worst_error(out, truth), None, bound)


def _worst_error(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a head: those of long sequences, whose outputs are small, count like the others."""
    return max(starmap(relative_error, zip(actual.flatten(0, 1), expected.flatten(0, 1), strict=True)))


def _append_error(task: Task, x: StepInputs) -> float:
    """The worst error of rotated queries and of everything in the slots, those that stay as they were included."""
    half = task.shape.qk_dim // 2
    angles = x.positions[:, None] * 10.0 ** -torch.arange(half, device=task.device)
    rotary = angles.cos(), angles.sin()
    k, v = (part[:, 0].roll(1, 0) for part in x.separate[:2])  # one token of each sequence

    def append(dtype: torch.dtype, backend: Backend) -> list[Tensor]:
        slots = [part.to(dtype, copy=True) for part in x.separate[:4]]
        new = [NewTokens(k.to(dtype), v.to(dtype), slots[i], slots[i + 1], rotate=True) for i in (0, 2)]
        return [append_tokens(x.q.to(dtype), new, x.positions, rotary, backend=backend), *slots]

    pairs = zip(append(task.dtype, task.backend), append(torch.float32, "eager"), strict=True)
    return max(relative_error(actual, expected) for actual, expected in pairs)


def choice_gap(x: StepInputs, chosen: Tensor, expected: Tensor, config: NSAConfig) -> float:
    """`checks.selection_gap` of each sequence whose choice differs, its new token the last of one document."""
    if chosen.shape != expected.shape:
        return float("inf")
    gaps = [0.0]
    for b in (chosen != expected).flatten(1).any(1).nonzero().flatten().tolist():
        length = int(x.positions[b]) + 1
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=x.q.device)
        summaries = x.separate.summary_k[b, : len(compressed_layout(cu_seqlens, length, config).block)]
        wanted = expected[b].repeat(length, 1, 1)  # [L, H_kv, n]
        taken = wanted.clone()
        taken[-1] = chosen[b]
        lse = _log_sum(x.q[b], summaries, length, config).expand(length, -1)
        queries = x.q[b].expand(length, -1, -1)
        gaps.append(selection_gap(taken, wanted, queries, summaries, lse, cu_seqlens, config)[0])
    return max(gaps)


def _log_sum(q: Tensor, summaries: Tensor, length: int, config: NSAConfig) -> Tensor:
    """Log-sum-exp of one query's scores [H, D] over the summaries [C, H_kv, D] that it sees, float64 [H]."""
    last = torch.arange(len(summaries), device=q.device) * config.compress_stride + config.compress_block_size
    heads = q.double().unflatten(0, (summaries.shape[1], -1))  # [H_kv, G, D]
    scores = torch.einsum("hgd,chd->hgc", heads, summaries.double()) * q.shape[-1] ** -0.5
    return scores.masked_fill(last > length, float("-inf")).logsumexp(-1).flatten()


def unusable_rivals(shape: Shape, config: NSAConfig, dtype: torch.dtype, device: torch.device) -> dict[Rival, str]:
    """Which rivals fail or compute something else than full attention of one token, and why."""
    x = make_step(shape, _RIVAL_LENGTHS, config, dtype, device)
    k, v = (part[:, : _RIVAL_LENGTHS[0]] for part in x.separate[:2])
    expected = decode_dense_attention(x.q.float(), k.float(), v.float(), x.positions, backend="eager")
    by_head = [part.transpose(1, 2).contiguous() for part in (k, v)]
    reasons: dict[Rival, str] = {}
    for rival in RIVALS:
        with pinned(rival):
            out, reason = if_supported(lambda: attend_one_token(x.q, *by_head))
        if out is not None and not _worst_error(out, expected) <= BOUNDS[dtype]:
            reason = f"wrong result: relative error {_worst_error(out, expected):.1e}"
        if reason is not None:
            reasons[rival] = reason
    return reasons
