"""Selection maps: which blocks of a text each query of an NSA layer chose, as pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray
from torch import Tensor

from nsa_lightning.evaluation.figures import new_figure
from nsa_lightning.evaluation.needle import NeedleConfig, NeedleTask
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.model.attention.base import Attended, AttentionLayer
from nsa_lightning.model.attention.nsa import NSAttention
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Residual, Transformer
from nsa_lightning.paths import expand_path

_CELLS = 128
"""Most rows and columns of a map: what a person can tell apart in a panel."""

# T tokens, R rows and C columns of a map, H_kv KV heads, n selected blocks.


@dataclass(frozen=True)
class SelectionMap:
    """How often queries of one layer chose blocks."""

    layer: int
    shares: NDArray[np.float32]
    """Share of a row's queries and KV heads that chose a column's blocks, [R, C]; NaN where none can be chosen."""
    tokens_a_row: int
    tokens_a_column: int


@torch.no_grad()
def selection_maps(model: Transformer, tokens: Tensor) -> list[SelectionMap]:
    """Maps of all NSA layers for one text.

    Args:
        model: its weights on one device, not sharded.
        tokens: int64 [T].

    Raises:
        ValueError: the model has no NSA layers, or the text is shorter than two of their blocks.
    """
    check_layers(model.config)
    block_size = model.config.nsa.select_block_size
    if len(tokens) < 2 * block_size:
        raise SettingError(f"the text of maps must have at least {2 * block_size} tokens, got {len(tokens)}")
    return [_shares(layer, blocks, block_size) for layer, blocks in _chosen_blocks(model, tokens)]


def check_layers(config: TransformerConfig) -> None:
    """Refuse a model that selects nothing.

    Raises:
        ValueError: it has no NSA layers.
    """
    if "nsa" not in config.attention:
        raise SettingError(f"maps need nsa layers, the model has {', '.join(dict.fromkeys(config.attention))} alone")


def text_of_maps(path: str | None, num_tokens: int, form: PromptForm) -> Tensor:
    """The first tokens of a text file, int64; without one those of a needle's prompt.

    Raises:
        ValueError: the file cannot be read.
    """
    if path is None:
        (planned,) = NeedleTask("single", NeedleConfig(depths=[0.5]), [num_tokens], form).cases()
        return torch.tensor(planned.build().prompt)
    try:
        text = Path(expand_path(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"the text of maps must be a text file, got {path}: {error}") from error
    return torch.tensor(form.text(text)[:num_tokens])


def draw_selection(maps: Sequence[SelectionMap], title: str) -> Any:
    """A panel for each layer: queries downwards, blocks of the text to the right, the darker the more chose them."""
    from matplotlib.colors import PowerNorm

    columns = min(len(maps), 6)
    lines = -(-len(maps) // columns)
    side = 3.6 if len(maps) <= 2 else 2.6 if len(maps) <= 6 else 1.9
    figure = new_figure(side * columns + 1.2, side * lines + 0.7)
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for panel, found in zip(grid.flat, maps, strict=False):
        rows, width = found.shares.shape
        image = panel.imshow(
            found.shares,
            norm=PowerNorm(0.5, vmin=0, vmax=1),
            cmap="inferno_r",
            aspect="auto",
            interpolation="nearest",
            extent=(0, width * found.tokens_a_column, rows * found.tokens_a_row, 0),
        )
        panel.set_facecolor("#e8ecf2")  # what lies in the future of a query
        panel.set_title(f"layer {found.layer}", fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in grid.flat[len(maps) :]:
        panel.set_axis_off()
    for panel in grid.flat[max(len(maps) - columns, 0) : len(maps)]:  # those with nothing below
        panel.tick_params(labelbottom=True)
    figure.supxlabel("token of the text", fontsize=9)
    figure.supylabel("query", fontsize=9)
    figure.colorbar(image, ax=grid, label="share of queries and heads that chose the block", fraction=0.03)
    figure.suptitle(title, fontsize=10)
    return figure


def _chosen_blocks(model: Transformer, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The blocks [T, H_kv, n] that the queries of each NSA layer chose, layer by layer."""
    device, length = tokens.device, len(tokens)
    offsets = torch.tensor([0, length], dtype=torch.int32, device=device)
    contexts = model.contexts(torch.arange(length, device=device), offsets, length)
    stream = Residual(model.embed_tokens(tokens))
    for index, (block, context) in enumerate(zip(model.blocks, contexts, strict=True)):
        chosen: list[Tensor] = []
        stream, _ = block.advance(stream, partial(_attended, block.self_attn, context, chosen))
        for blocks in chosen:
            yield index, blocks


def _attended(layer: AttentionLayer, context: Any, chosen: list[Tensor], x: Tensor) -> Attended:
    """The layer's output; what an NSA layer chose is appended to `chosen`."""
    if not isinstance(layer, NSAttention):
        return layer(x, context)
    result = layer.attend(layer.projections(x, context.batch.rotary), context)
    chosen.append(result.block_indices)
    return Attended(layer.output(result.out))


def _shares(layer: int, blocks: Tensor, block_size: int) -> SelectionMap:
    """Count blocks, int32 [T, H_kv, n] with -1 for none, in as many cells as fit."""
    num_tokens, heads = blocks.shape[:2]
    num_blocks = -(-num_tokens // block_size)
    blocks_a_column, tokens_a_row = -(-num_blocks // _CELLS), -(-num_tokens // _CELLS)
    rows, columns = -(-num_tokens // tokens_a_row), -(-num_blocks // blocks_a_column)
    query = torch.arange(num_tokens, device=blocks.device)
    chosen = blocks >= 0
    cell = (query // tokens_a_row)[:, None, None] * columns + blocks.long().clamp(min=0) // blocks_a_column
    counts = torch.zeros(rows * columns, device=blocks.device)
    counts.index_add_(0, cell[chosen], torch.ones_like(cell[chosen], dtype=counts.dtype))
    # What could have been chosen: each query has its own block and those before it.
    reachable = torch.zeros(num_tokens, columns, device=blocks.device)
    for column in range(columns):
        first = column * blocks_a_column
        reachable[:, column] = (query // block_size - first + 1).clamp(0, min(blocks_a_column, num_blocks - first))
    possible = torch.zeros(rows, columns, device=blocks.device)
    possible.index_add_(0, query // tokens_a_row, reachable)
    shares = counts.view(rows, columns) / (possible * heads)  # 0 / 0 where nothing could be chosen
    return SelectionMap(layer, shares.cpu().numpy(), tokens_a_row, blocks_a_column * block_size)
