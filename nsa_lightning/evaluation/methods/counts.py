"""What a sparse method leaves of attention: probability mass, tokens, and the best blocks that it reads."""

import torch
from torch import Tensor

from nsa_lightning.evaluation.methods.scores import forced, group_sum, token_mask, top_blocks, visible
from nsa_lightning.evaluation.methods.settings import MethodSettings

# N queries, S keys, H query heads, H_kv KV heads.

MEASURED_EVERY = 16
"""One query of so many of a prompt is measured, those at the multiples: dense scores of all would take most time."""

_FIELDS = ("mass", "tokens_read", "products", "queries", "recalled", "best")


class Counts:
    """Sums over queries, heads and layers, kept on their device until they are asked for.

    Args:
        settings: of the method; recall is counted against `exact_top_blocks` under them.
        num_kv_heads: of the model.
    """

    def __init__(self, settings: MethodSettings, num_kv_heads: int) -> None:
        self._settings, self._num_kv_heads = settings, num_kv_heads
        self._sums: dict[str, Tensor | float] = {}

    def add_prompt(self, scores: Tensor, keep: Tensor, first: int, products: Tensor | float) -> None:
        """Count queries of a prompt, the first at position `first`; as `add`, keep bool [H, N, S]."""
        chosen = sampled(first)
        positions = torch.arange(first, first + scores.shape[1], device=scores.device)[chosen]
        part = products[chosen] if isinstance(products, Tensor) else products
        self.add(scores[:, chosen], keep[:, chosen], positions, part, weight=MEASURED_EVERY)

    def add(
        self, scores: Tensor, keep: Tensor, positions: Tensor, products: Tensor | float, weight: float = 1.0
    ) -> None:
        """Count some queries.

        Args:
            scores: dense ones, scaled, [H, N, S]; what a query may not see need not be masked.
            keep: what was read, bool, broadcasts to [H, N, S].
            positions: of the queries, [N].
            products: keys, or vectors as long as keys, that each query head was multiplied with to choose: a mean, or
                by query [N].
            weight: queries that each of them stands for.
        """
        if not len(positions):
            return
        length = scores.shape[-1]
        seen = visible(positions, length)
        probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        keep = (keep & seen).expand_as(scores)
        self._sum("mass", (probabilities * keep).sum(dtype=torch.float64) / len(scores), weight)
        self._sum("tokens_read", keep.sum() / len(scores), weight)
        self._sum("products", products.sum() if isinstance(products, Tensor) else products * len(positions), weight)
        self._sum("queries", float(len(positions)), weight)
        if self._settings.budget % self._settings.block_size == 0:
            best = best_blocks(probabilities, positions, self._settings, self._num_kv_heads)
            best &= ~forced(
                positions, torch.arange(length, device=scores.device), self._settings.leading, self._settings.local
            )
            self._sum("recalled", (best & keep).sum(dtype=torch.float64), weight)
            self._sum("best", best.sum(dtype=torch.float64), weight)

    def take(self) -> dict[str, float]:
        """Means since the last call: `mass`, `tokens_read`, `products` and `recall`, without what was not counted.

        `recall` is the share of the tokens in the best blocks that were read, forced ones left aside; it is left out
        where no block was to be chosen.
        """
        sums = {name: float(self._sums.get(name, 0.0)) for name in _FIELDS}
        self._sums = {}
        if not sums["queries"]:
            return {}
        means = {name: sums[name] / sums["queries"] for name in ("mass", "tokens_read", "products")}
        return means | ({"recall": sums["recalled"] / sums["best"]} if sums["best"] else {})

    def _sum(self, name: str, value: Tensor | float, weight: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value * weight


def sampled(first: int) -> slice:
    """The queries of a prompt that are measured, of those from position `first` on."""
    return slice(-first % MEASURED_EVERY, None, MEASURED_EVERY)


def best_blocks(probabilities: Tensor, positions: Tensor, settings: MethodSettings, num_kv_heads: int) -> Tensor:
    """The tokens that `exact_top_blocks` reads, bool [H, N, S], by dense probabilities [H, N, S]."""
    heads, length, size = len(probabilities), probabilities.shape[-1], settings.block_size
    shared = group_sum(probabilities, num_kv_heads)  # [H_kv, N, S]
    padded = torch.nn.functional.pad(shared, (0, -length % size))
    sums = padded.unflatten(-1, (-1, size)).sum(-1)  # [H_kv, N, P]
    count = settings.budget // size
    blocks = top_blocks(sums, positions, size, settings.leading, settings.local, count)
    return token_mask(blocks, size, positions, length, heads)
