"""The methods' definitions in plain loops over queries and heads: the specification that tests hold them to.

Each function says what one query reads, given what came before; `literal` runs it over a text.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from nsa_kernels.rotary import apply_rotary
from torch import Tensor

from nsa_lightning.evaluation.methods.settings import MethodSettings, blocks_of
from nsa_lightning.model.rope import RopeConfig, rotary_frequencies

# L tokens, H query heads, H_kv KV heads, D head dim.


class Text(NamedTuple):
    """One sequence and how it came: `prompt` tokens at once, then one after another."""

    q: Tensor  # rotated, [L, H, D]
    k: Tensor  # rotated, [L, H_kv, D]
    v: Tensor  # [L, H_kv, D_v]
    prompt: int
    settings: MethodSettings
    rope: RopeConfig

    @property
    def group_size(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // self.k.shape[1]

    def scores(self, t: int, head: int) -> Tensor:
        """Scaled scores of a query against the tokens up to itself, [t + 1]."""
        return self.k[: t + 1, head // self.group_size] @ self.q[t, head] * self.q.shape[-1] ** -0.5

    def probabilities(self, t: int, head: int) -> Tensor:
        """Dense ones, [t + 1]."""
        return self.scores(t, head).softmax(0)

    def forced(self, t: int) -> set[int]:
        """The leading and local tokens of a query."""
        return {s for s in range(t + 1) if s < self.settings.leading or s > t - self.settings.local}

    def alike(self, head: int) -> list[int]:
        """The heads that choose together with one."""
        if not self.settings.per_group:
            return [head]
        first = head - head % self.group_size
        return list(range(first, first + self.group_size))

    def turned(self, x: Tensor, by: int) -> Tensor:
        """Rotate a head on by some positions, [D]."""
        angles = by * rotary_frequencies(self.rope, len(x)).to(x.dtype)[None]
        return apply_rotary(x[None, None], angles.cos(), angles.sin())[0, 0]


Reads = Callable[[Text, int, int], set[int]]


def literal(
    name: str, q: Tensor, k: Tensor, v: Tensor, prompt: int, settings: MethodSettings, rope: RopeConfig, phases: str
) -> tuple[Tensor, Tensor]:
    """Attend a text by a method, query by query.

    Args:
        name: of the method.
        q: rotated queries, [L, H, D].
        k: rotated keys, [L, H_kv, D].
        v: values, [L, H_kv, D_v].
        prompt: tokens that come in one call; the rest is decoded one by one.
        settings: of the method.
        rope: of the model.
        phases: where the method is sparse: prefill, decode or both.

    Returns:
        [L, H, D_v] and what was read, bool [L, H, L].
    """
    text = Text(q, k, v, prompt, settings, rope)
    if name == "h2o":
        return _h2o(text, phases)
    if name == "infllm":
        return _infllm(text, phases)
    choose = {
        "full": lambda text, t, head: set(range(t + 1)),
        "exact_top": _exact_top,
        "exact_top_blocks": _exact_top_blocks,
        "quest": _quest,
        "sliding": _sliding,
    }[name]
    out, read = v.new_zeros(*q.shape[:2], v.shape[-1]), torch.zeros(*q.shape[:2], len(k), dtype=torch.bool)
    for t in range(len(q)):
        for head in range(q.shape[1]):
            tokens = choose(text, t, head) if _is_sparse(t, prompt, phases) else set(range(t + 1))
            read[t, head, list(tokens)] = True
            out[t, head] = _attend(text, t, head, sorted(tokens))[0]
    return out, read


def _is_sparse(t: int, prompt: int, phases: str) -> bool:
    return phases in ("both", "prefill" if t < prompt else "decode")


def _attend(text: Text, t: int, head: int, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Output of one query over some tokens, and their probabilities."""
    probabilities = text.scores(t, head)[tokens].softmax(0)
    return probabilities @ text.v[tokens, head // text.group_size], probabilities


def _highest(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda each: -scores[each])[:count])


def _exact_top(text: Text, t: int, head: int) -> set[int]:
    """The forced tokens, and the highest of the rest."""
    if text.settings.per_group:
        values = torch.stack([text.probabilities(t, other) for other in text.alike(head)]).sum(0)
    else:
        values = text.scores(t, head)
    fixed = text.forced(t)
    rest = {s: values[s].item() for s in range(t + 1) if s not in fixed}
    return fixed | _highest(rest, text.settings.free)


def _with_blocks(text: Text, t: int, size: int, scores: dict[int, float]) -> set[int]:
    """The tokens of the forced blocks, and of those with the highest scores."""
    own, settings = t // size, text.settings
    local = blocks_of(settings.local, size)
    fixed = {j for j in range(own + 1) if j < blocks_of(settings.leading, size) or j > own - local}
    rest = {j: score for j, score in scores.items() if j not in fixed}
    chosen = fixed | _highest(rest, settings.budget // size - len(fixed))
    return {s for j in chosen for s in range(j * size, (j + 1) * size) if s <= t}


def _exact_top_blocks(text: Text, t: int, head: int) -> set[int]:
    """Blocks by their probability, summed over the heads of the group."""
    size, first = text.settings.block_size, head - head % text.group_size
    summed = sum(text.probabilities(t, other) for other in range(first, first + text.group_size))
    assert isinstance(summed, Tensor)
    return _with_blocks(text, t, size, {j: part.sum().item() for j, part in enumerate(summed.split(size))})


def _quest(text: Text, t: int, head: int) -> set[int]:
    """Pages by the bound that their keys up to the query allow."""
    size, scores = text.settings.page_size, {}
    for j in range(t // size + 1):
        keys = text.k[j * size : min((j + 1) * size, t + 1), head // text.group_size]
        scores[j] = sum(
            torch.maximum(text.q[t, other] * keys.amin(0), text.q[t, other] * keys.amax(0)).sum().item()
            for other in text.alike(head)
        )
    return _with_blocks(text, t, size, scores)


def _sliding(text: Text, t: int, head: int) -> set[int]:
    """The leading tokens and the last ones."""
    window = text.settings.budget - text.settings.leading
    return {s for s in range(t + 1) if s < text.settings.leading or s > t - window}


def _h2o(text: Text, phases: str) -> tuple[Tensor, Tensor]:
    """Every head drops tokens for good; the sums of a group's heads are one where it chooses together."""
    settings, heads = text.settings, text.q.shape[1]
    out, read = text.v.new_zeros(*text.q.shape[:2], text.v.shape[-1]), torch.zeros(*text.q.shape[:2], len(text.k))
    kept: list[dict[int, float]] = [{} for _ in range(heads)]  # sum of each token that is left, by head
    for t in range(len(text.q)):
        prompt = t < text.prompt
        sparse, every = _is_sparse(t, text.prompt, phases), settings.evict_every if prompt else 1
        if sparse and (not prompt or t % every == 0):
            for sums in kept:
                _drop(sums, t, settings.budget - every, settings)
        for sums in kept:
            sums[t] = 0.0
        for head in range(heads):
            tokens = sorted(kept[head]) if sparse else list(range(t + 1))
            read[t, head, tokens] = 1
            out[t, head], probabilities = _attend(text, t, head, tokens)
            for other in text.alike(head):
                for s, p in zip(tokens, probabilities.tolist(), strict=True):
                    kept[other][s] = kept[other].get(s, 0.0) + p
    return out, read.bool()


def _drop(sums: dict[int, float], t: int, left: int, settings: MethodSettings) -> None:
    """Drop the tokens of the lowest sums before the one at t comes, until so many are left."""
    while len(sums) > left:
        loose = [s for s in sums if s >= settings.leading and s <= t - settings.local]
        del sums[min(loose, key=lambda s: sums[s])]


def _infllm(text: Text, phases: str) -> tuple[Tensor, Tensor]:
    """Weights of tokens in the window, blocks behind it, a choice for all heads."""
    settings, heads, size = text.settings, text.q.shape[1], text.settings.memory_block_size
    out, read = text.v.new_zeros(*text.q.shape[:2], text.v.shape[-1]), torch.zeros(*text.q.shape[:2], len(text.k))
    weights = text.q.new_zeros(len(text.k), heads)
    for t in range(len(text.q)):
        sparse = _is_sparse(t, text.prompt, phases)
        start = t - t % settings.query_block if t < text.prompt else t  # the queries that choose together
        stop = min(start + settings.query_block, text.prompt) if t < text.prompt else t + 1
        far = settings.leading + max((start - settings.leading - settings.local) // size, 0) * size
        if t == start:  # weights of what is beyond the window do not change any more
            chosen = _infllm_blocks(text, start, stop, far, weights)
        tokens = [
            s for s in range(t + 1) if s < settings.leading or s >= far or (s - settings.leading) // size in chosen
        ]
        tokens = tokens if sparse else list(range(t + 1))
        for head in range(heads):
            scores = text.scores(t, head)
            if sparse and settings.far_positions == "window":
                query = text.turned(text.q[t, head], settings.local - 1 - t)
                for s in range(t - settings.local + 1):
                    still = text.turned(text.k[s, head // text.group_size], -s)
                    scores[s] = query @ still * len(query) ** -0.5
            probabilities = scores[tokens].softmax(0)
            read[t, head, tokens] = 1
            out[t, head] = probabilities @ text.v[tokens, head // text.group_size]
            for s, p in zip(tokens, probabilities.tolist(), strict=True):
                if s > t - settings.local:
                    weights[s, head] += p
    return out, read.bool()


def _infllm_blocks(text: Text, start: int, stop: int, far: int, weights: Tensor) -> set[int]:
    """The blocks between the leading tokens and `far` that the queries from `start` to `stop` choose."""
    settings, scores = text.settings, {}
    size = settings.memory_block_size
    for j in range((far - settings.leading) // size):
        first, total = settings.leading + j * size, 0.0
        for head in range(text.q.shape[1]):
            turned = [text.turned(text.q[t, head], settings.local - 1 - t) for t in range(start, stop)]
            best = weights[first : first + size, head].topk(settings.representatives).indices + first
            still = [text.turned(text.k[s, head // text.group_size], -s) for s in best.tolist()]
            total += (torch.stack(turned).mean(0) @ torch.stack(still).mean(0)).item()
        scores[j] = total
    return _highest(scores, settings.free // size)
