"""How a model attends while it is evaluated: by its own layers, or by a sparse method in the place of dense ones."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from nsa_kernels.errors import SettingError

from nsa_lightning.model.cached import Cache
from nsa_lightning.model.transformer import Transformer, TransformerConfig


class Method(Protocol):
    """A way to attend to the tokens of a cache."""

    name: str
    settings: Mapping[str, Any]
    """Everything that changes a result, as JSON."""
    cuda_graphs: bool
    """Whether a step of decoding may be captured in a CUDA graph."""
    packs: bool
    """Whether the model's `forward` attends by the method, too, so that texts can be scored end to end."""

    def check(self, config: TransformerConfig) -> None:
        """Refuse a model that the method does not fit, before its weights are read."""
        ...

    def attach(self, model: Transformer, measure: bool) -> AbstractContextManager[None]:
        """Attend by this method inside; with `measure` also count what it leaves out."""
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

    def check(self, config: TransformerConfig) -> None:
        """Every model has layers."""

    @contextmanager
    def attach(self, model: Transformer, measure: bool) -> Iterator[None]:
        """They are attached."""
        yield

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


def open_methods(names: Sequence[str], config: TransformerConfig) -> list[Method]:
    """The methods of those names; none for the model's own layers.

    Raises:
        ValueError: there is no method of a name, or the model has no such layers.
    """
    own = OwnLayers(config)
    found: list[Method] = []
    for name in dict.fromkeys(names or [own.name]):
        if name not in (own.name, "own"):
            raise SettingError(f"methods must be of own, {own.name}, got {name}")
        found.append(own)
    return found
