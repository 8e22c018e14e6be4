"""The decoder in plain PyTorch."""

from nsa_lightning.model.attention import registry
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer

__all__ = ["Cache", "Transformer", "TransformerConfig", "registry"]
