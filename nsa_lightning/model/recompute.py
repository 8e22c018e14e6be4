"""Activation checkpointing: backward computes a block again instead of keeping what it needs of it."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nsa_lightning.model.attention.registry import kept_operators
from nsa_lightning.model.compat import operator_name

Recompute = Literal["none", "block", "selective"]

R = TypeVar("R")


def recomputed(mode: Recompute, function: Callable[..., R], *args: Any) -> R:
    """Call a function whose activations backward computes again.

    Args:
        mode: `none` keeps all activations, `block` the arguments alone, `selective` also what the attention operators
            return: outputs, log-sum-exps and chosen blocks, so that backward runs none of them twice.
        function: draws no random numbers.
        args: its arguments.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_keep, kept_operators()))
    return checkpoint(function, *args, **options)


def _keep(names: tuple[str, ...], context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what attention returns: much to compute and, beside the feed-forward layer, little to store."""
    attention = operator_name(operator).startswith(names)
    return CheckpointPolicy.MUST_SAVE if attention else CheckpointPolicy.PREFER_RECOMPUTE
