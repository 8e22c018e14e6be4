"""A memory estimate as text."""

from nsa_lightning.memory.estimate import MemoryEstimate
from nsa_lightning.memory.settings import StepSettings

CONTEXT, NCCL = 6e8, 1e9
"""Bytes outside PyTorch's allocator, of CUDA and its kernels and of NCCL's channels: allowances, not computed."""

_COMPILED = (
    "\nmodel.compile is not simulated: compiled blocks fuse norms, rotations and SwiGLU and keep less of what lies "
    "between them,\nso activations are at most these; weights, gradients, optimizer state and attention are the same"
)


def report(estimate: MemoryEstimate, settings: StepSettings, recompute: str, compiled: bool) -> str:
    """What is alive at the peak, the peaks by part of the step, and what is needed beside them; GB are 10^9 bytes."""
    place, peak = estimate.worst
    kinds = sorted(((size, kind) for kind, size in peak.kinds.items() if size), reverse=True)
    allowance = CONTEXT + (NCCL if settings.world_size > 1 else 0)
    tokens, sharing = settings.batch_size * settings.seq_len, settings.context_parallel_size
    lines = [
        f"{estimate.num_parameters:,} parameters; {settings.strategy} on {_count(settings.world_size, 'GPU')}, "
        f"{_count(tokens, 'token')} a step on {'each' if sharing == 1 else f'every {sharing} of them together'}, "
        f"activation checkpointing {recompute}",
        "",
        f"{'most is alive in the ' + place:<53}GB",
        *(f"  {kind:<44}{_gb(size)}" for size, kind in kinds),
        f"  {'together':<44}{_gb(peak.total)}",
        "",
        "peak by part of the step",
        *(f"  {stage:<44}{_gb(total)}" for stage, total in estimate.by_stage.items()),
        "",
        f"{'outside of PyTorch, about: CUDA, kernels' + (', NCCL' if settings.world_size > 1 else ''):<46}"
        f"{_gb(allowance)}",
        f"{'a GPU needs, without fragmentation':<46}{_gb(peak.total + allowance)}",
    ]
    if estimate.host:
        lines.append(f"{'host memory: weights, gradients, optimizer':<46}{_gb(estimate.host)}")
    if compiled:
        lines.append(_COMPILED)
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:9.3f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
