"""A model and the cache of a batch of sequences: prompts go in, logits of the next token of each sequence come out."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa_lightning.generation.cuda_graphs import capture
from nsa_lightning.generation.rewind import CacheMark
from nsa_lightning.model.attention.base import CachedAttention
from nsa_lightning.model.attention.dense import ExactAttention
from nsa_lightning.model.cached import Cache, decode, prefill
from nsa_lightning.model.loss import token_cross_entropy
from nsa_lightning.model.transformer import Transformer

# B sequences, L tokens of a prompt, A tokens of an answer, V tokens in the vocabulary.

_SCORED_TOKENS = 512
"""Tokens whose logits are held at once."""


class Scored(NamedTuple):
    """How likely tokens were, on the CPU."""

    log_probs: Tensor  # of each in nats, float32 [A]
    likeliest: Tensor  # whether no other token was more likely, bool [A]


class Decoder:
    """Continues up to B sequences of different lengths at once; every step has the same shapes.

    Args:
        model: its parameters' device and dtype are those of the cache.
        batch_size: sequences (B).
        capacity: tokens of the longest sequence, prompt and continuation.
        cuda_graphs: replay the step as a CUDA graph instead of launching its kernels one by one; on a GPU only.
        dense_attention: how `full` layers attend to the cache.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        capacity: int,
        cuda_graphs: bool,
        dense_attention: CachedAttention = ExactAttention(),  # noqa: B008 (not changed)
    ) -> None:
        weight = model.output_embedding
        self.model, self.batch_size = model, batch_size
        self._idle = set(range(batch_size))
        sizes = model.config, batch_size, capacity
        self.cache = Cache.allocate(*sizes, weight.device, weight.dtype, dense_attention)
        self._tokens = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        self._graph = capture(self._run, self._forget) if cuda_graphs and weight.is_cuda else None

    @torch.inference_mode()
    def begin(self, row: int, prompt: Tensor) -> Tensor:
        """Give a row to a prompt, int64 [L]; logits [V] of the token after it."""
        self._idle.discard(row)
        self.cache.reset(row)
        return self._logits(prefill(self.model, prompt.to(self._tokens.device), self.cache, row))

    @torch.inference_mode()
    def score(self, row: int, logits: Tensor, answer: Tensor) -> "Scored":
        """How likely an answer is behind a row's prompt; the row is left as it was.

        Args:
            row: a row that `begin` has filled, and no step since.
            logits: what `begin` returned, [V].
            answer: int64 [A], A at least 1.

        Raises:
            ValueError: the cache has no room for all but the last of them.
        """
        answer = answer.to(self._tokens.device)
        first = score_logits(logits[None], answer[:1])
        if len(answer) == 1:
            return first
        self.cache.check_room(row, len(answer) - 1)
        mark = CacheMark(self.cache, row, len(answer) - 1)
        try:
            hidden = prefill(self.model, answer[:-1], self.cache, row, every=True)
        finally:
            mark.restore()
        rest = score_hidden(hidden, self.model.output_embedding, answer[1:])
        return Scored(*(torch.cat(pair) for pair in zip(first, rest, strict=True)))

    @torch.inference_mode()
    def log_probabilities(self, row: int, tokens: Tensor) -> Tensor:
        """Give a row to a text, int64 [L]; the log-probability of each token but its first, nats, float32 [L - 1]."""
        self._idle.discard(row)
        self.cache.reset(row)
        tokens = tokens.to(self._tokens.device)
        hidden = prefill(self.model, tokens, self.cache, row, every=True)
        return -token_cross_entropy(hidden[:-1], self.model.output_embedding, tokens[1:], ignore_index=-1).cpu()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to every sequence; logits [B, V] of the next, overwritten by the step after it."""
        for row in self._idle:  # they take tokens too, until they are full
            if self.cache.host_lengths[row] == self.cache.capacity:
                self.cache.reset(row)
        self._tokens.copy_(torch.tensor(tokens), non_blocking=True)
        if self._graph is None:
            return self._run()
        self.cache.count_step()
        return self._graph.replay()

    @torch.inference_mode()
    def end(self, row: int) -> None:
        """Leave a row idle and empty, which costs least: its tokens and logits mean nothing until `begin`."""
        self._idle.add(row)
        self.cache.reset(row)

    def _run(self) -> Tensor:
        return self._logits(decode(self.model, self._tokens, self.cache))

    def _logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.output_embedding.T

    def _forget(self) -> None:
        for row in range(self.batch_size):
            self.cache.reset(row)


def score_hidden(hidden: Tensor, output_embedding: Tensor, tokens: Tensor) -> Scored:
    """How likely tokens, int64 [A], are by the final hidden states in front of each, [A, hidden_size]."""
    parts = [
        score_logits(states @ output_embedding.T, chosen)
        for states, chosen in zip(hidden.split(_SCORED_TOKENS), tokens.split(_SCORED_TOKENS), strict=True)
    ]
    return Scored(*(torch.cat(part) for part in zip(*parts, strict=True)))


def score_logits(logits: Tensor, tokens: Tensor) -> Scored:
    """How likely tokens, int64 [A], are by the logits in front of each, [A, V]."""
    found = logits.float().log_softmax(-1)
    return Scored(found.gather(1, tokens[:, None])[:, 0].cpu(), (found.argmax(-1) == tokens).cpu())
