"""What every sparse method is: a way for the dense layers of a model to attend to their cache, and what it counts."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.evaluation.methods.counts import MEASURED_EVERY, Counts, sampled
from nsa_lightning.evaluation.methods.rows import RowState, Saved
from nsa_lightning.evaluation.methods.scores import chunk_scores, pieces, step_scores
from nsa_lightning.evaluation.methods.settings import MethodSettings, Phases
from nsa_lightning.model.attention.dense import ExactAttention
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.config import TransformerConfig

# T new tokens of one sequence, L all of its tokens, B sequences, S slots of a cache, H query heads, H_kv KV heads.


class SparseMethod(ABC):
    """A `CachedAttention` for `full` layers that reads a part of the cache; see its docstrings for shapes.

    Args:
        settings: of the method.
        config: of the model.
        measure: count what the method leaves of attention, which takes dense scores of some queries.

    Raises:
        ValueError: the settings do not fit the method or the model.
    """

    name: ClassVar[str]
    used: ClassVar[tuple[str, ...]] = ()
    """Settings that the method reads, beside budget, leading, local, dense_layers and phases."""

    published_phases: ClassVar[Phases] = "both"
    published_dense_layers: ClassVar[int] = 0
    cuda_graphs: ClassVar[bool] = False
    """Whether a step of decoding may be captured in a CUDA graph."""

    packs: ClassVar[bool] = False
    """Whether `Transformer.forward` attends by it."""

    def __init__(self, settings: MethodSettings, config: TransformerConfig, measure: bool = False) -> None:
        self.config, self.phases = config, settings.phases or self.published_phases
        self.choice = settings
        self.dense_layers = self._dense_layers(settings, config)
        self.sparse_prompt, self.sparse_answer = self.phases != "decode", self.phases != "prefill"
        self._exact = ExactAttention()
        self._answering = False
        self._counts = Counts(settings, config.num_kv_heads) if measure else None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that changes a result, as JSON."""
        names = ("budget", "leading", "local", *self.used)
        chosen = {name: value for name, value in asdict(self.choice).items() if name in names}
        return chosen | {"dense_layers": sorted(self.dense_layers), "phases": self.phases}

    def begin(self) -> None:
        """Forget all sequences: the cache is a new one."""
        for state in self._states():
            state.clear()

    def prefill(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend new tokens of one sequence, as `CachedAttention.prefill`."""
        if layer in self.dense_layers:
            return self._exact.prefill(layer, row, start, q, k, v)
        if start == 0:
            for state in self._states():
                state.reset(layer, row)
        if self._answering:
            return self._answer(layer, row, start, q, k, v)
        if self.sparse_prompt or self._must_stay_sparse(layer, row, start):
            return self._prompt(layer, row, start, q, k, v)
        if self.sparse_answer:
            self._watch(layer, row, start, q, k)
        return self._exact.prefill(layer, row, start, q, k, v)

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attend a new token of each sequence, as `CachedAttention.decode`."""
        if layer in self.dense_layers or not self.sparse_answer:
            return self._exact.decode(layer, q, k, v, positions)
        return self._step(layer, slice(0, len(q)), q, k, v, positions.long())

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, `prefill` attends its tokens as `decode` would, one after another."""
        self._answering = True
        try:
            yield
        finally:
            self._answering = False

    def save(self, row: int) -> list[Saved]:
        """What the method keeps of a sequence beside the cache."""
        return [state.save(row) for state in self._states()]

    def restore(self, row: int, saved: list[Saved]) -> None:
        """Take a sequence back to what `save` returned."""
        for state, kept in zip(self._states(), saved, strict=True):
            state.restore(row, kept)

    def statistics(self) -> Mapping[str, float]:
        """Means over the queries of sparse layers since the last call; see `Counts.take`. Empty if not measured."""
        return {} if self._counts is None else self._counts.take()

    def cache_bytes(self, config: TransformerConfig, length: int, dtype: torch.dtype) -> int:
        """Memory that a sequence of that many tokens needs by the method's definition, with what it chooses by.

        Here the cache itself holds every token, also where the method would not read it again.
        """
        layers = sum(kind == "full" for kind in config.layer_attention) - len(self.dense_layers)
        return Cache.bytes_needed(config, 1, length, dtype) + layers * self._more_bytes(length, dtype.itemsize)

    @abstractmethod
    def _prompt(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend new tokens of a prompt, sparsely."""

    @abstractmethod
    def _step(self, layer: int, rows: slice, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """Attend a new token of each of some rows, sparsely; positions int64."""

    def _watch(  # noqa: B027 (most methods keep nothing)
        self, layer: int, row: int, start: int, q: Tensor, k: Tensor
    ) -> None:
        """See new tokens of a prompt that is dense; what later choices need is kept."""

    def _must_stay_sparse(self, layer: int, row: int, start: int) -> bool:
        """Whether more of a prompt can't be dense any more."""
        return False

    def _states(self) -> tuple[RowState, ...]:
        """What is kept of sequences."""
        return ()

    def _more_bytes(self, length: int, item: int) -> int:
        """Bytes of a layer beyond keys and values of all tokens, whose numbers take `item` bytes each."""
        return 0

    def _token_bytes(self, item: int) -> int:
        """Bytes of a token's keys and values in a layer."""
        shape = self.config.layer_shape
        return shape.num_kv_heads * (shape.head_dim + shape.value_head_dim) * item

    def _answer(self, layer: int, row: int, start: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend tokens of one sequence one after another."""
        if not self.sparse_answer:
            return self._exact.prefill(layer, row, start, q, k, v)
        rows, out = slice(row, row + 1), []
        for position, query in enumerate(q, start=start):
            end = position + 1
            at = torch.tensor([position], device=q.device)
            out.append(self._step(layer, rows, query[None], k[None, :end], v[None, :end], at))
        return torch.cat(out)

    def _count_chunk(self, q: Tensor, k: Tensor, start: int, tokens: Tensor, keep: Tensor, products: float) -> None:
        """Measure queries of a prompt.

        Args:
            q: [N, H, D].
            k: what the last of them may see, [L, H_kv, D].
            start: position of the first.
            tokens: those of which some were read, int64 [n] or by head [X, n], -1 for none.
            keep: which were, bool [N, n] or [X, N, n].
            products: as `Counts.add`.
        """
        if self._counts is None:
            return
        heads = 1 if tokens.ndim == 1 else len(tokens)
        chosen = sampled(start)
        positions = torch.arange(start, start + len(q), device=q.device)[chosen]
        q, keep = q[chosen], keep[..., chosen, :].expand(heads, -1, -1)
        places = tokens.masked_fill(tokens < 0, len(k)).view(heads, 1, -1)
        for first, stop in pieces(0, len(q), q.shape[1] * len(k), q.device):
            read = torch.zeros(heads, stop - first, len(k) + 1, dtype=torch.bool, device=q.device)
            read.scatter_(-1, places.expand(-1, stop - first, -1), keep[:, first:stop])
            read = read[..., :-1].repeat_interleave(q.shape[1] // heads, dim=0)
            scores = chunk_scores(q[first:stop], k)
            self._counts.add(scores, read, positions[first:stop], products, MEASURED_EVERY)

    def _count_step(self, q: Tensor, k: Tensor, tokens: Tensor, positions: Tensor, products: Tensor | float) -> None:
        """Measure a query of each sequence, tokens [B, X, n] with -1 for none."""
        if self._counts is not None:
            places = tokens.masked_fill(tokens < 0, k.shape[1]).transpose(0, 1)  # [X, B, n]
            keep = torch.zeros(*places.shape[:2], k.shape[1] + 1, dtype=torch.bool, device=q.device)
            keep = keep.scatter_(-1, places, True)[..., :-1].repeat_interleave(q.shape[1] // len(places), dim=0)
            self._counts.add(step_scores(q, k), keep, positions, products)

    @classmethod
    def _dense_layers(cls, settings: MethodSettings, config: TransformerConfig) -> frozenset[int]:
        """The `full` layers that stay dense."""
        full = {index for index, kind in enumerate(config.layer_attention) if kind == "full"}
        if not full:
            raise SettingError(
                f"method {cls.name} needs a model with full attention layers, got {', '.join(config.attention)}"
            )
        chosen = settings.dense_layers
        if chosen is None:
            chosen = min(cls.published_dense_layers, len(full) - 1)
        if max([0, *settings.dense_list]) > config.num_layers - (not isinstance(chosen, int)):
            raise SettingError(
                f"dense_layers must be within the {config.num_layers} layers of the model, got {settings.dense_layers}"
            )
        return frozenset(full & set(range(chosen) if isinstance(chosen, int) else chosen))
