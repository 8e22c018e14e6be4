"""The decoder in plain PyTorch."""

from nsa_lightning.model.cache import Cache
from nsa_lightning.model.transformer import Transformer, TransformerConfig

__all__ = ["Cache", "Transformer", "TransformerConfig"]
