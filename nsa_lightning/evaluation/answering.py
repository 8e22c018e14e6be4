"""Asks a model the cases of a task: prompts are cached once, then answers are scored and generated behind them."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.evaluation.case import GREEDY, Answer, Case
from nsa_lightning.evaluation.method import Method
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.generation.device import free_memory
from nsa_lightning.generation.generate import Generation, Speed, StopConfig
from nsa_lightning.generation.sampling import Sampler, SamplingConfig
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.transformer import Transformer

_SPARE = 0.6
"""The share of the free memory that a batch of caches may take; the rest is for what is computed with them."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a number of cases took."""

    cases: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    cache_bytes: int = 0
    """Of the longest sequence."""

    def add(self, speed: Speed, cases: int, cache_bytes: int) -> "Cost":
        """This and the tokens and seconds of a decoding loop."""
        sums = {name: value + getattr(self, name) for name, value in asdict(speed).items()}
        return replace(self, cases=self.cases + cases, cache_bytes=max(self.cache_bytes, cache_bytes), **sums)


class Given(NamedTuple):
    """The answer to one of several cases."""

    number: int
    answer: Answer


class Answerer:
    """A model under one method.

    Args:
        model: with its weights; the method is attached to it.
        tokenizer: of the model.
        end_tokens: tokens that end an answer.
        method: how the model attends.
        batch_size: the most cases that are answered at once.
        cuda_graphs: replay steps of decoding as CUDA graphs, on a GPU and where the method allows it.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        end_tokens: Collection[int],
        method: Method,
        batch_size: int,
        cuda_graphs: bool,
    ) -> None:
        self._model, self._tokenizer, self._end_tokens = model, tokenizer, end_tokens
        self._method, self._batch_size = method, batch_size
        self._cuda_graphs = cuda_graphs and method.cuda_graphs
        self.cost = Cost()

    def answers(
        self,
        cases: Sequence[Case],
        stop: StopConfig,
        sampling: SamplingConfig = GREEDY,
    ) -> Iterator[Given]:
        """Answer cases, in any order.

        Raises:
            ValueError: the cache of a single case does not fit the memory.
        """
        groups: dict[int, list[int]] = {}
        for number, case in enumerate(cases):
            groups.setdefault(case.max_new_tokens, []).append(number)
        for limit, numbers in groups.items():
            chosen = [cases[number] for number in numbers]
            decoder = self._decoder(chosen, limit)
            if limit == 0:
                found = self._scored(decoder, chosen)
            else:
                found = self._generated(decoder, chosen, replace(stop, max_new_tokens=limit), sampling)
            for given in found:
                yield Given(numbers[given.number], given.answer)

    def _decoder(self, cases: Sequence[Case], limit: int) -> Decoder:
        """Room for as many of the cases as the memory takes."""
        capacity = max(len(case.prompt) + max(len(case.expected), limit, 1) for case in cases)
        weight, config = self._model.output_embedding, self._model.config
        one = Cache.bytes_needed(config, 1, capacity, weight.dtype)
        fitting = int(free_memory(weight.device) * _SPARE) // one
        if fitting == 0:
            raise SettingError(
                f"lengths must fit the memory of {weight.device}: a cache of {capacity} tokens takes {one / 1e9:.2f} GB"
            )
        rows = min(self._batch_size if limit else 1, len(cases), fitting)
        return Decoder(self._model, rows, capacity, self._cuda_graphs and limit > 0)

    def _scored(self, decoder: Decoder, cases: Sequence[Case]) -> Iterator[Given]:
        """The likelihoods alone."""
        for number, case in enumerate(cases):
            start, prompt = time.perf_counter(), torch.tensor(case.prompt)
            if case.whole:
                log_probs = decoder.log_probabilities(0, prompt)
            else:
                log_probs = self._score(decoder, 0, decoder.begin(0, prompt), case)
            decoder.end(0)
            speed = Speed(prefill_tokens=len(prompt), prefill_seconds=time.perf_counter() - start)
            self._count(speed, 1, decoder)
            yield Given(number, Answer("", 0, None, log_probs.tolist()))

    def _generated(
        self, decoder: Decoder, cases: Sequence[Case], stop: StopConfig, sampling: SamplingConfig
    ) -> Iterator[Given]:
        """Answers, and the likelihoods of those that are expected."""
        log_probs: dict[int, list[float]] = {}

        def begun(number: int, row: int, logits: Tensor) -> None:
            if cases[number].expected:
                log_probs[number] = self._score(decoder, row, logits, cases[number]).tolist()

        config, device = self._model.config, self._model.output_embedding.device
        sampler = Sampler(sampling, decoder.batch_size, config.vocab_size, device)
        loop = Generation(decoder, sampler, self._tokenizer, self._end_tokens, stop, begun)
        texts = [""] * len(cases)
        for piece in loop.run([case.prompt for case in cases], [case.seed for case in cases]):
            number = piece.prompt
            texts[number] += piece.text
            if piece.finish is not None:
                yield Given(number, Answer(texts[number], len(piece.tokens), piece.finish, log_probs.get(number, ())))
        self._count(loop.speed, len(cases), decoder)

    def _count(self, speed: Speed, cases: int, decoder: Decoder) -> None:
        """Add to the cost."""
        dtype = self._model.output_embedding.dtype
        cache_bytes = self._method.cache_bytes(self._model.config, decoder.cache.capacity, dtype)
        self.cost = self.cost.add(speed, cases, cache_bytes)

    def _score(self, decoder: Decoder, row: int, logits: Tensor, case: Case) -> Tensor:
        """Log-probability of each expected token, nats; the row is left as it was."""
        saved = self._method.save(row)
        with self._method.answering():
            found = decoder.score(row, logits, torch.tensor(case.expected))
        self._method.restore(row, saved)
        return found
