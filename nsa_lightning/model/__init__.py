"""The decoder in plain PyTorch."""

from nsa_lightning.model.transformer import Transformer, TransformerConfig

__all__ = ["Transformer", "TransformerConfig"]
