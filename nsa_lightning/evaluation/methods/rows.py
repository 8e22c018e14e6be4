"""State of a method beside the cache: a tensor for each layer, with a row for each sequence."""

from collections.abc import Mapping

import torch
from torch import Tensor

# R rows, S places of a row; what follows is the state's own.

Saved = Mapping[int, Tensor]
"""One row of every layer."""


class RowState:
    """Tensors [R, S, ...] by layer, made when they are first needed and grown with the rows and places that are.

    Args:
        empty: the number that new places hold.
    """

    def __init__(self, empty: float) -> None:
        self._empty = empty
        self._layers: dict[int, Tensor] = {}

    def of(self, layer: int, rows: int, places: int, rest: tuple[int, ...], like: Tensor) -> Tensor:
        """The tensor of a layer, [R, S, *rest] with at least so many rows and places.

        Args:
            layer: index of the decoder layer.
            rows: at least so many.
            places: at least so many.
            rest: sizes of one place.
            like: the device and dtype of the tensor when it is made.
        """
        kept = self._layers.get(layer)
        if kept is not None and kept.shape[0] >= rows and kept.shape[1] >= places:
            return kept
        size = (rows, places) if kept is None else (max(rows, kept.shape[0]), max(places, kept.shape[1]))
        grown = torch.full((*size, *rest), self._empty, device=like.device, dtype=like.dtype)
        if kept is not None:
            grown[: kept.shape[0], : kept.shape[1]] = kept
        self._layers[layer] = grown
        return grown

    def reset(self, layer: int, row: int) -> None:
        """Empty a row of a layer."""
        if layer in self._layers and row < len(self._layers[layer]):
            self._layers[layer][row] = self._empty

    def clear(self) -> None:
        """Forget all layers."""
        self._layers.clear()

    def save(self, row: int) -> Saved:
        """A copy of one row."""
        return {layer: kept[row].clone() for layer, kept in self._layers.items() if row < len(kept)}

    def restore(self, row: int, saved: Saved) -> None:
        """Take one row back to its copy."""
        for layer, kept in self._layers.items():
            if row < len(kept):
                kept[row] = self._empty
                if layer in saved:
                    kept[row, : len(saved[layer])] = saved[layer]
