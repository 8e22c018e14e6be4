"""How much arithmetic a training step needs: the count behind model FLOPs utilisation (MFU)."""

from torch import nn

from nsa_lightning.model.attention.base import Lengths
from nsa_lightning.model.transformer import Transformer


def training_flops(model: Transformer, lengths: Lengths) -> int:
    """FLOPs of forward and backward over documents of these lengths.

    Every weight of a linear layer costs 6 FLOPs a token: a multiplication and an addition, forward and twice
    backward; every visible query-key pair the same for each of its D_qk + D_v dimensions and each head. Block
    summaries count once a block. Recomputation, norms, softmax and the ranking of blocks are left out, as is usual.
    """
    config, shape = model.config, model.config.layer_shape
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    others = sum(block.self_attn.other_products(lengths) for block in model.blocks)
    pairs = sum(int(kind.visible_pairs(config, lengths).sum()) for kind in config.layer_kinds)
    pair_dims = shape.num_heads * (shape.head_dim + shape.value_head_dim)
    return 6 * (linear * int(lengths.sum()) + others + pair_dims * pairs)
