"""Are the stages right? Each one beside the eager backend in float32, on the same small inputs, before any timing.

A stage passes if ‖a - b‖ / ‖b‖ of its output and of every gradient is within the bound of its dtype; the choice of
blocks passes if, wherever it differs, the blocks it took are as important as those it left, within the same bound.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from nsa_kernels import NSAConfig, native_sparse_attention, plan
from nsa_kernels.backends import Backend
from nsa_kernels.packing import batch_layout, compressed_layout, document_index, document_positions
from torch import Tensor

from nsa_lightning.benchmark.cases import DocumentMix, Shape
from nsa_lightning.benchmark.inputs import Inputs, make_inputs
from nsa_lightning.benchmark.rivals import RIVALS, Rival, full_attention
from nsa_lightning.benchmark.stages import StageFunctions, plain_stages, stage_functions
from nsa_lightning.benchmark.timing import if_supported
from nsa_lightning.model.fused_attention import packed_causal_attention

BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}
"""Largest relative error; float32 leaves room for products in TF32."""

_MOST_ROWS = 2048
_RIVAL_PACKINGS: dict[DocumentMix, list[int]] = {"one": [777], "mixed": [129, 300, 65, 411], "equal_1k": [256] * 3}

# T packed tokens, H query heads, H_kv KV heads, D head dim, C compressed blocks, n selected blocks; R rows looked at,
# J selection blocks of the longest document.

_Function = Callable[..., tuple[Tensor, ...]]


class Check(NamedTuple):
    """The verdict on one stage of one shape."""

    shape: str
    stage: str
    output_error: float
    gradient_error: float | None
    """The worst over all inputs; None where there is no gradient."""
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every error is within the bound; NaN is not."""
        return self.output_error <= self.bound and (self.gradient_error is None or self.gradient_error <= self.bound)


class Task(NamedTuple):
    """One shape to check: what runs, and on what."""

    shape: Shape
    lengths: list[int]
    config: NSAConfig
    dtype: torch.dtype
    device: torch.device
    backend: Backend


def check_stages(task: Task) -> Iterator[Check]:
    """Compare every stage, and the whole operator, given the reference's block indices.

    Where kernels have one backward for all branches, the gradients of attention are those of the whole.
    """
    shape, bound = task.shape.name, BOUNDS[task.dtype]
    x = make_inputs("random", task.shape, task.lengths, task.config, task.dtype, task.device)
    cu, config = x.cu_seqlens, task.config
    chosen, exact = plan(x.q, x.v, config, task.backend), plain_stages("eager", cu, config)
    stages = stage_functions(chosen, cu, config, batch_layout(cu, len(x.q), config))
    with torch.no_grad():
        ck, cv = (exact.compress(y) for y in (x.k, x.v))
        _, lse = exact.compressed_attention(x.q.float(), ck.float(), cv.float())
        blocks = exact.block_selection(x.q.float(), ck.float(), lse)

    def compare(stage: str, function: Callable[[StageFunctions], _Function], *leaves: Tensor) -> Check:
        alone = stage == "compress" or chosen.backend != "triton"
        return Check(shape, stage, *relative_errors(function(stages), function(exact), leaves, alone), bound)

    yield compare("compress", lambda s: lambda k, v: (s.compress(k), s.compress(v)), x.k, x.v)
    yield compare("compressed_attention", lambda s: s.compressed_attention, x.q, ck, cv)
    with torch.no_grad():
        choice = stages.block_selection(x.q, ck, lse)
    gap, differing = selection_gap(choice, blocks, x.q, ck, lse, cu, config)
    yield Check(shape, "block_selection", gap, None, bound, f"{differing:.2%} of rows differ; error: importance gap")
    yield compare("selected_attention", lambda s: lambda q, k, v: s.selected_attention(q, k, v, blocks), x.q, x.k, x.v)
    yield compare("sliding_attention", lambda s: s.sliding_attention, x.q, x.k, x.v)
    leaves = (x.q, x.k, x.v, x.gates, *2 * (x.k, x.v))
    errors = relative_errors(_whole(task, x, blocks, task.backend), _whole(task, x, blocks, "eager"), leaves)
    yield Check(shape, "whole", *errors, bound, "given block indices")


def _whole(task: Task, x: Inputs, blocks: Tensor, backend: Backend) -> _Function:
    """The operator with keys and values of each branch, so that none hides the gradients of another."""

    def call(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"block_indices": blocks, "backend": backend}
        options |= zip(("sliding_k", "sliding_v", "compress_k", "compress_v"), others, strict=True)
        return (native_sparse_attention(q, k, v, gates, x.cu_seqlens, task.config, **options).out,)

    return call


def relative_errors(
    actual: _Function, expected: _Function, inputs: Sequence[Tensor], gradients: bool = True
) -> tuple[float, float | None]:
    """The worst ‖a - b‖ / ‖b‖ over the outputs, and over the gradients of all inputs, `expected` run in float32."""
    ours = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().float().requires_grad_() for x in inputs]
    outputs, truths = actual(*ours), expected(*theirs)
    output_error = max(relative_error(a, b) for a, b in zip(outputs, truths, strict=True))
    if not gradients:
        return output_error, None
    differentiable = [i for i, truth in enumerate(truths) if truth.requires_grad]  # not the log-sum-exp
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    grads = [
        torch.randn(truths[i].shape, generator=generator, device=truths[i].device).to(outputs[i].dtype)
        for i in differentiable
    ]
    ours_grads = torch.autograd.grad([outputs[i] for i in differentiable], ours, grads)
    truth_grads = torch.autograd.grad([truths[i] for i in differentiable], theirs, [grad.float() for grad in grads])
    return output_error, max(relative_error(a, b) for a, b in zip(ours_grads, truth_grads, strict=True))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖a - b‖ / ‖b‖; where b is 0, ‖a‖. Infinite if anything is not finite or the shapes differ."""
    if actual.shape != expected.shape or not bool(actual.detach().isfinite().all()):
        return float("inf")
    a, b = actual.detach().double(), expected.detach().double()
    error, size = (a - b).norm(), b.norm()
    return float(error / size if size > 0 else error)


def selection_gap(
    chosen: Tensor, expected: Tensor, q: Tensor, ck: Tensor, lse: Tensor, cu_seqlens: Tensor, config: NSAConfig
) -> tuple[float, float]:
    """How much worse the chosen blocks are than the expected ones, and how many rows differ.

    Returns:
        Over rows that differ (the first 2048 of them), the largest (best block left out - worst block taken) / best
        block left out, in float64 importance; 0 if none differs, infinite if a row is no possible choice: unordered,
        with another number of blocks, without a forced block or with one the query does not see. And the share of
        rows that differ.
    """
    if chosen.shape != expected.shape or chosen.dtype != torch.int32:
        return float("inf"), 1.0
    differs = (chosen != expected).any(-1)  # [T, H_kv]
    tokens, heads = differs.nonzero()[:_MOST_ROWS].unbind(1)
    if not len(tokens):
        return 0.0, 0.0
    importance = _importance(q, ck, lse, tokens, heads, cu_seqlens, config)  # [R, J]
    rows, truth = chosen[tokens, heads].long(), expected[tokens, heads].long()
    J = importance.shape[1]
    order = rows.where(rows >= 0, J)
    possible = (rows < J).all() & (rows >= -1).all() & ((order.diff() > 0) | (order[:, 1:] == J)).all()
    if not bool(possible) or not torch.equal((rows >= 0).sum(1), (truth >= 0).sum(1)):
        return float("inf"), float(differs.float().mean())

    def as_mask(blocks: Tensor) -> Tensor:  # [R, n] -> [R, J]
        mask = torch.zeros(len(blocks), J + 1, dtype=torch.bool, device=blocks.device)
        return mask.scatter_(1, blocks.where(blocks >= 0, J), True)[:, :J]

    taken, wanted = as_mask(rows), as_mask(truth)
    best_left = importance.masked_fill(~(wanted & ~taken), -1.0).amax(1)
    worst_taken = importance.masked_fill(~(taken & ~wanted), float("inf")).amin(1)
    gap = ((best_left - worst_taken) / best_left).nan_to_num(nan=float("inf"))  # a forced block is infinite
    return max(float(gap.max()), 0.0), float(differs.float().mean())


def _importance(
    q: Tensor, ck: Tensor, lse: Tensor, tokens: Tensor, heads: Tensor, cu_seqlens: Tensor, config: NSAConfig
) -> Tensor:
    """Importance of the blocks of some (token, KV head) rows, float64 [R, J]; forced +inf, not visible -inf."""
    num_tokens, group_size = len(q), q.shape[1] // ck.shape[1]
    layout = compressed_layout(cu_seqlens, num_tokens, config)
    position = document_positions(cu_seqlens, num_tokens)[tokens]
    document = document_index(cu_seqlens, num_tokens)[tokens]
    columns = heads[:, None] * group_size + torch.arange(group_size, device=q.device)  # [R, G]
    queries, log_sums = q[tokens[:, None], columns].double(), lse[tokens[:, None], columns].double()
    keys = ck.double()[:, heads].permute(1, 2, 0)  # [R, D, C]
    last = layout.block * config.compress_stride + config.compress_block_size - 1
    visible = layout.is_block & (layout.document == document[:, None]) & (last <= position[:, None])  # [R, C]
    p = (queries @ keys * q.shape[-1] ** -0.5 - log_sums[..., None]).exp().sum(1).where(visible, 0.0)
    blocks = torch.arange(int(cu_seqlens.diff().max()) // config.select_block_size + 1, device=q.device)
    importance = torch.zeros(len(tokens), len(blocks), dtype=torch.float64, device=q.device)
    for chunk in range(config.compress_block_size // config.compress_stride):
        owner = (layout.block + chunk) // (config.select_block_size // config.compress_stride)
        importance.index_add_(1, owner, p)
    own = position[:, None] // config.select_block_size
    forced = (blocks < config.num_init_blocks) | (blocks > own - config.num_local_blocks)
    return importance.masked_fill(forced, float("inf")).masked_fill(blocks > own, float("-inf"))


def unusable_rivals(
    shape: Shape, config: NSAConfig, dtype: torch.dtype, device: torch.device
) -> dict[tuple[Rival, DocumentMix], str]:
    """Which rivals fail or compute something else than full causal attention on a small packing, and why."""
    reasons: dict[tuple[Rival, DocumentMix], str] = {}
    for mix, lengths in _RIVAL_PACKINGS.items():
        x = make_inputs("random", shape, lengths, config, dtype, device)
        for rival in RIVALS:
            error, reason = if_supported(partial(_rival_error, rival, lengths, x))
            if error is not None and not error <= BOUNDS[dtype]:
                reason = f"wrong result: relative error {error:.1e}"
            if reason is not None:
                reasons[rival, mix] = reason
    return reasons


def _rival_error(rival: Rival, lengths: list[int], x: Inputs) -> float:
    """The worst of output and gradients."""
    attention = full_attention(rival, lengths, x.cu_seqlens)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (packed_causal_attention(q, k, v, x.cu_seqlens, max(lengths)),)

    output, gradient = relative_errors(lambda q, k, v: (attention(q, k, v),), exact, (x.q, x.k, x.v))
    return float("inf") if gradient is None else max(output, gradient)
