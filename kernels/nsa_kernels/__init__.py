"""Native Sparse Attention (arXiv:2502.11089) for PyTorch: the attention operator, usable on its own."""

from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput
from nsa_kernels.native_sparse_attention import native_sparse_attention

__all__ = ["CompressionWeights", "NSAConfig", "NSAOutput", "native_sparse_attention"]
