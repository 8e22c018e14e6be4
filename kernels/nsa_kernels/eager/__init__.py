"""Native Sparse Attention in plain PyTorch: what a CPU trains on, and any device without Triton.

Same stages, names and results as in `reference`, but vectorised and with bounded memory: queries are processed a chunk
at a time. Scores, softmax and gradients are computed in float32 (float64 for float64 inputs), whatever autocast says.
"""

from nsa_kernels.eager.attention import attend_branch_by_branch
from nsa_kernels.eager.block_selection import block_selection
from nsa_kernels.eager.compress import compress
from nsa_kernels.eager.compressed_attention import compressed_attention
from nsa_kernels.eager.selected_attention import selected_attention
from nsa_kernels.eager.sliding_attention import sliding_attention

__all__ = [
    "attend_branch_by_branch",
    "block_selection",
    "compress",
    "compressed_attention",
    "selected_attention",
    "sliding_attention",
]
