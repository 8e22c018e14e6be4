"""Native Sparse Attention written as its definition: slow, in any float type, differentiable (arXiv:2502.11089).

    out[t] = g_cmp[t] * o_cmp[t] + g_slc[t] * o_slc[t] + g_win[t] * o_win[t]

One document at a time, one query at a time; only heads and one query's keys are vectorised. Nothing is cast up, so
float64 in is float64 throughout. Every faster backend is compared with these functions, and those of `eager` have their
signatures.
"""

from nsa_kernels.reference.attention import native_sparse_attention
from nsa_kernels.reference.block_selection import block_importance, block_selection
from nsa_kernels.reference.compress import compress
from nsa_kernels.reference.compressed_attention import compressed_attention
from nsa_kernels.reference.selected_attention import selected_attention
from nsa_kernels.reference.sliding_attention import sliding_attention

__all__ = [
    "block_importance",
    "block_selection",
    "compress",
    "compressed_attention",
    "native_sparse_attention",
    "selected_attention",
    "sliding_attention",
]
