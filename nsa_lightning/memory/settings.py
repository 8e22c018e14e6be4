"""What of a run's settings decides about memory."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What of the trainer's and the data's settings decides about a step's memory."""

    strategy: Literal["auto", "ddp", "fsdp2"]
    world_size: int
    parameter_dtype: torch.dtype
    """Of the weights that the optimizer updates."""
    compute_dtype: torch.dtype
    """Of matrix products: by autocast, or of the gathered weights with fsdp2."""
    seq_len: int
    batch_size: int
    accumulates: bool = False
    """Gradients of earlier batches are kept."""
    watches: bool = True
    """Gates and selection are logged."""
    bucket_view: bool = False
    """DDP's buckets are the gradients themselves."""
    context_parallel_size: int = 1
    """GPUs that share each batch."""
    cpu_offload: bool = False
    reshard_after_forward: bool = True
    reduce_every_batch: bool = False
