"""The learned part of the summaries of compression blocks in NSA layers."""

import torch
from nsa_kernels import CompressionWeights
from torch import nn

from nsa_lightning.model.config import NSALayerConfig
from nsa_lightning.model.context_parallel import ContextParallel


class BlockSummary(nn.Module):
    """The learned part of φ(x) = mean(x) + f(x + e), one per KV head; it starts at zero."""

    def __init__(self, num_kv_heads: int, head_dim: int, config: NSALayerConfig) -> None:
        super().__init__()
        block_size = config.compress_block_size
        mlp = config.compression == "mlp"
        hidden = (config.compression_hidden_size or head_dim) if mlp else head_dim
        self.position_embedding = nn.Parameter(torch.zeros(num_kv_heads, block_size, head_dim))
        self.in_weight = nn.Parameter(torch.zeros(num_kv_heads, block_size * head_dim, hidden))
        self.in_bias = nn.Parameter(torch.zeros(num_kv_heads, hidden))
        self.out_weight = nn.Parameter(torch.zeros(num_kv_heads, hidden, head_dim)) if mlp else None
        self.out_bias = nn.Parameter(torch.zeros(num_kv_heads, head_dim)) if mlp else None

    @property
    def in_std(self) -> float:
        """Deviation of the first layer's weights to begin with; everything else is 0, so the summary is the mean."""
        return self.in_weight.shape[1] ** -0.5 if self.out_weight is not None else 0.0

    @property
    def multiplied_weights(self) -> int:
        """Weights that one block of tokens is multiplied with."""
        return self.in_weight.numel() + (self.out_weight.numel() if self.out_weight is not None else 0)

    def forward(self, parallel: ContextParallel) -> CompressionWeights:
        """The parameters as the operator takes them, those of this rank's KV heads.

        It is called as a module, so that what brings offloaded parameters to a call brings them here too.
        """
        return CompressionWeights(
            parallel.share(self.position_embedding),
            parallel.share(self.in_weight),
            parallel.share(self.in_bias),
            parallel.share(self.out_weight) if self.out_weight is not None else None,
            parallel.share(self.out_bias) if self.out_bias is not None else None,
        )
