"""The decoder in plain PyTorch."""

import nsa_lightning.model.attention.registry  # noqa: F401 (makes the attention kinds known)
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer

__all__ = ["Cache", "Transformer", "TransformerConfig"]
