"""A picture of all gates: one row a layer, one panel a branch, one column a head."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def draw_gates(means: Mapping[int, Tensor], branches: Sequence[str], title: str) -> NDArray[np.uint8]:
    """Draw mean gate scores.

    Args:
        means: by layer, mean score of each head and branch, [H, len(branches)] in [0, 1].
        branches: names of the branches.
        title: heading.

    Returns:
        The picture, uint8 [height, width, 3].
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = torch.stack(list(means.values())).numpy()  # [layers, H, branches]
    num_layers, num_heads, num_branches = table.shape
    figure = Figure(figsize=(3.2 * num_branches + 1.2, min(1.6 + 0.42 * num_layers, 14)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_branches, sharey=True, squeeze=False)[0]
    for index, (panel, branch) in enumerate(zip(panels, branches, strict=True)):
        scores = table[:, :, index]
        image = panel.imshow(scores, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
        panel.set_title(f"{branch}\nmean {scores.mean():.2f}")
        panel.set_xlabel("query head")
        panel.set_xticks(range(0, num_heads, max(1, num_heads // 8)))
        panel.set_yticks(range(num_layers), [f"{layer}" for layer in means])
        if num_layers * num_heads <= 128:
            for row, column in np.ndindex(scores.shape):
                colour = "black" if scores[row, column] > 0.6 else "white"
                text = f"{scores[row, column]:.2f}"
                panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="mean gate score", fraction=0.04)
    figure.suptitle(title)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
