"""What the tests of the reference share: one branch alone, dense attention, compressed keys."""

import torch
from nsa_kernels import reference
from nsa_kernels.geometry import NSAConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from support.packings import Inputs

COMPRESSED, SELECTED, SLIDING = range(3)

TINY = NSAConfig(
    compress_block_size=4,
    compress_stride=2,
    select_block_size=4,
    num_selected_blocks=3,
    num_init_blocks=1,
    num_local_blocks=1,
    window_size=3,
)
TINY_LENGTHS = [3, 0, 14]  # one document shorter than a block, one with more blocks than are selected


def attend(inputs: Inputs, config: NSAConfig, block_indices: Tensor | None = None):
    return reference.native_sparse_attention(**inputs._asdict(), config=config, block_indices=block_indices)


def only(branch: int, inputs: Inputs) -> Inputs:
    """The same inputs with one gate open and the others shut."""
    gates = torch.zeros_like(inputs.gates)
    gates[..., branch] = 1
    return inputs._replace(gates=gates)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal (or masked) attention of one document by PyTorch: [L, H, D] -> [L, H, D_v]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return o[0].transpose(0, 1)


def compressed(inputs: Inputs, config: NSAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed keys, compressed values and the lse of the queries over them."""
    compressed_k = reference.compress(inputs.compress_k, inputs.cu_seqlens, config, inputs.k_weights)
    compressed_v = reference.compress(inputs.compress_v, inputs.cu_seqlens, config, inputs.v_weights)
    _, lse = reference.compressed_attention(inputs.q, compressed_k, compressed_v, inputs.cu_seqlens, config)
    return compressed_k, compressed_v, lse
