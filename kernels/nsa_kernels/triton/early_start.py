"""Launches that begin while the one before them ends (programmatic dependent launch): short kernels in a row.

A kernel of such a launch calls `await_launch_before` before it reads what the launch before it wrote, and before it
writes memory that any launch still reads. What is older it may read at once if, of the launches under way, the oldest
let others begin only after its own wait: then everything before that one is done. Every grid has programs that wait,
also where there is nothing to do: a launch that ends is then known to end after those before it.
"""

import functools

import torch
import triton
import triton.language as tl

from nsa_kernels.triton.primitives import interpreted


@triton.jit
def let_next_begin(EARLY: tl.constexpr):
    """The programs of the next launch may start once all of this one have come here."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def await_launch_before(EARLY: tl.constexpr):
    """What earlier launches wrote may be read from here on."""
    if EARLY:
        tl.extra.cuda.gdc_wait()


@functools.cache
def early_start(device: torch.device) -> tuple[bool, dict[str, bool]]:
    """Whether a launch may begin while the one before it ends, as from Hopper on, and the option that lets it."""
    early = not interpreted() and torch.cuda.get_device_capability(device)[0] >= 9
    return early, {"launch_pdl": True} if early else {}
