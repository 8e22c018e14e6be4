"""Sparse attention methods that need no training, in the place of a dense model's attention to its cache."""

from nsa_kernels.errors import SettingError

from nsa_lightning.evaluation.methods.base import SparseMethod
from nsa_lightning.evaluation.methods.exact import ExactTop, ExactTopBlocks, Full
from nsa_lightning.evaluation.methods.h2o import H2O
from nsa_lightning.evaluation.methods.infllm import InfLLM
from nsa_lightning.evaluation.methods.quest import Quest
from nsa_lightning.evaluation.methods.settings import MethodSettings
from nsa_lightning.evaluation.methods.sliding import Sliding
from nsa_lightning.model.config import TransformerConfig

__all__ = ["METHODS", "MethodSettings", "SparseMethod", "make_method"]

_CLASSES: dict[str, type[SparseMethod]] = {
    each.name: each for each in (Full, ExactTop, ExactTopBlocks, Quest, InfLLM, H2O, Sliding)
}

METHODS: dict[str, str] = {
    "full": "all tokens",
    "exact_top": "the tokens with the highest scores of each head, by dense scores",
    "exact_top_blocks": "the blocks with the most probability of each KV head, by dense scores",
    "quest": "the pages whose keys' extremes allow the highest scores",
    "infllm": "the blocks whose representative tokens have the highest scores",
    "h2o": "the tokens with the most attention so far; others are dropped for good",
    "sliding": "the first and the last tokens",
}
"""What each method reads, by name."""


def make_method(name: str, settings: MethodSettings, config: TransformerConfig, measure: bool = False) -> SparseMethod:
    """A method for a model.

    Args:
        name: one of METHODS.
        settings: of the method.
        config: of the model.
        measure: count what the method leaves of attention, which takes dense scores of some queries.

    Raises:
        ValueError: there is no such method, or its settings do not fit it or the model.
    """
    if name not in _CLASSES:
        raise SettingError(f"method must be one of {', '.join(_CLASSES)}, got {name}")
    return _CLASSES[name](settings, config, measure)
