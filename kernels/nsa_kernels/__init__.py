"""Native Sparse Attention (arXiv:2502.11089) for PyTorch: the attention operator, usable on its own.

What needs torch is imported at its first use, so that code without tensors shares `nsa_kernels.errors` at no cost.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nsa_kernels.errors import SettingError

if TYPE_CHECKING:
    from nsa_kernels.attention import native_sparse_attention
    from nsa_kernels.backends import Plan, plan
    from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput

__all__ = [
    "CompressionWeights",
    "NSAConfig",
    "NSAOutput",
    "Plan",
    "SettingError",
    "native_sparse_attention",
    "plan",
]

_MODULES = {
    "CompressionWeights": "geometry",
    "NSAConfig": "geometry",
    "NSAOutput": "geometry",
    "Plan": "backends",
    "native_sparse_attention": "attention",
    "plan": "backends",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
