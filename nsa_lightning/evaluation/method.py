"""How a model attends while it is evaluated: by its own layers, or by a sparse method in place of full attention."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.evaluation.methods import METHODS, MethodSettings, make_method
from nsa_lightning.model.attention.base import CachedAttention
from nsa_lightning.model.attention.dense import ExactAttention
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.config import TransformerConfig

_EXACT = ExactAttention()


class Method(CachedAttention, Protocol):
    """How `full` layers attend to a cache, with what is told of it."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that changes a result, as JSON."""
        ...

    @property
    def cuda_graphs(self) -> bool:
        """Whether a step of decoding may be captured in a CUDA graph."""
        ...

    @property
    def packs(self) -> bool:
        """Whether the model's `forward` attends by the method, too, so that texts can be scored end to end."""
        ...

    def begin(self) -> None:
        """Forget all rows: another cache is used from here on."""
        ...

    def answering(self) -> AbstractContextManager[None]:
        """Inside, the tokens of a chunk are computed as if they were decoded one after another."""
        ...

    def save(self, row: int) -> Any:
        """What the method keeps of a row beside the cache."""
        ...

    def restore(self, row: int, saved: Any) -> None:
        """Take it back to what `save` returned."""
        ...

    def statistics(self) -> Mapping[str, float]:
        """Means since the last call, by name."""
        ...

    def cache_bytes(self, config: TransformerConfig, length: int, dtype: torch.dtype) -> int:
        """Memory of one sequence of that many tokens."""
        ...


class OwnLayers:
    """The layers that the model has, named by their kinds: `full`, `nsa`, `full+nsa`."""

    cuda_graphs = packs = True
    settings: Mapping[str, Any] = {}

    def __init__(self, config: TransformerConfig) -> None:
        self.name = "+".join(dict.fromkeys(config.layer_attention))

    def prefill(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `CachedAttention.prefill`: to all tokens."""
        return _EXACT.prefill(layer, row, start, q, k, v)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """As `CachedAttention.decode`: to all tokens."""
        return _EXACT.decode(layer, q, k, v, positions)

    def begin(self) -> None:
        """The cache is all they keep."""

    def answering(self) -> AbstractContextManager[None]:
        """A chunk gives what its tokens would, one after another."""
        return nullcontext()

    def save(self, row: int) -> None:
        """The cache is all they keep."""

    def restore(self, row: int, saved: Any) -> None:
        """The cache is all they keep."""

    def statistics(self) -> Mapping[str, float]:
        """Nothing is left out that would be counted."""
        return {}

    def cache_bytes(self, config: TransformerConfig, length: int, dtype: torch.dtype) -> int:
        """That of the cache."""
        return Cache.bytes_needed(config, 1, length, dtype)


def open_methods(
    names: Sequence[str], settings: MethodSettings, config: TransformerConfig, measure: bool
) -> list[Method]:
    """The methods of those names; the model's own layers if there are none.

    Args:
        names: `own` or what `OwnLayers` is named, and sparse methods.
        settings: of the sparse methods.
        config: of the model.
        measure: count the attention mass that sparse methods keep and the blocks that they recall.

    Raises:
        ValueError: there is no method of a name, or its settings do not fit it or the model.
    """
    own = OwnLayers(config)
    known = [own.name, *(name for name in METHODS if name != "full")]
    found: dict[str, Method] = {}
    for given in names or [own.name]:
        name = own.name if given == "own" else given
        if name not in known:
            raise SettingError(f"methods must be of {', '.join(known)}, got {name}")
        found[name] = own if name == own.name else make_method(name, settings, config, measure)
    return list(found.values())
