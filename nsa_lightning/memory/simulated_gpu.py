"""A GPU that need not be there: tensors without numbers, kernels that are not launched."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.memory.compat import FakeTensorMode, pretended_gpu, without_launches
from nsa_lightning.model import loss

DEVICE = "cpu"
"""Device type of the simulated tensors: autograd takes tensors of a GPU only where there is one."""

ASSUMED_CAPABILITY = (9, 0)
"""Compute capability where no GPU is at hand to ask: H100 and H200."""
_MULTIPROCESSORS = 132
"""What the kernels' work is divided by; they are not launched, and allocate the same whatever it is."""


@contextmanager
def simulated_gpu() -> Generator[None, None, None]:
    """Within, tensors have shapes alone and pass for a GPU's, and kernels are not launched.

    The model takes the same way as on a GPU, and the attention operators' own Python says what they allocate.

    Raises:
        ValueError: Triton is not installed, without which a GPU would not run the kernels either.
    """
    if find_spec("triton") is None:
        raise SettingError("nsa memory needs the package triton, which is not installed: it has wheels for Linux alone")
    import nsa_kernels.triton.attention  # noqa: F401 - kernels are interpreted or not from their import on
    from nsa_kernels.triton.early_start import early_start

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else ASSUMED_CAPABILITY
    with ExitStack() as stack:
        stack.enter_context(pretended_gpu(capability, _MULTIPROCESSORS))
        stack.enter_context(without_launches())
        stack.enter_context(patch.object(F, "rms_norm", _rms_norm))
        stack.enter_context(patch.object(loss, "fused_walk", lambda _: _walk))
        stack.enter_context(FakeTensorMode())
        stack.callback(early_start.cache_clear)  # what it keeps of a device is not the simulated one's
        yield


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    """One kernel on a GPU; in float32 under autocast."""
    return _FusedNorm.apply(x.float() if torch.is_autocast_enabled(DEVICE) else x, weight)


class _FusedNorm(torch.autograd.Function):
    """The memory of PyTorch's RMSNorm on a GPU: it keeps its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """[..., hidden_size] in and out."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _walk(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Loss of a chunk and its gradient in the logits; what lies between is in registers."""
    return logits.new_empty((), dtype=torch.float32), torch.empty_like(logits)
