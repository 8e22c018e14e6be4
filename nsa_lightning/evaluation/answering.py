"""Asks a model the cases of a task: prompts are cached once, then answers are scored and generated behind them."""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.packing import document_positions
from torch import Tensor

from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.evaluation.case import GREEDY, Answer, Case
from nsa_lightning.evaluation.method import Method
from nsa_lightning.generation.decoder import Decoder, Scored, score_hidden
from nsa_lightning.generation.device import free_memory
from nsa_lightning.generation.generate import Generation, Speed, StopConfig
from nsa_lightning.generation.sampling import Sampler, SamplingConfig
from nsa_lightning.model.cached import Cache
from nsa_lightning.model.transformer import Transformer

PACKED_TOKENS = 16384
"""Tokens of texts that are scored in one pass; a longer text goes alone."""

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
        model: with its weights.
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
        groups: dict[int | None, list[int]] = {}
        for number, case in enumerate(cases):
            packed = self._method.packs and not case.max_new_tokens and not case.whole
            groups.setdefault(None if packed else case.max_new_tokens, []).append(number)
        for limit, numbers in groups.items():
            chosen = [cases[number] for number in numbers]
            if limit is None:
                found = self._packed(chosen)
            elif limit == 0:
                found = self._scored(self._decoder(chosen, limit), chosen)
            else:
                found = self._generated(
                    self._decoder(chosen, limit), chosen, replace(stop, max_new_tokens=limit), sampling
                )
            for given in found:
                yield Given(numbers[given.number], given.answer)

    def _packed(self, cases: Sequence[Case]) -> Iterator[Given]:
        """The likelihoods alone, of many texts in one pass; those that differ in their last token share a text."""
        texts: dict[tuple[int, ...], list[int]] = {}
        for number, case in enumerate(cases):
            texts.setdefault((*case.prompt, *case.expected[:-1]), []).append(number)
        for batch in _batches(sorted(texts, key=len), PACKED_TOKENS):
            start = time.perf_counter()
            scored = [
                Given(number, _scored_answer(self._likelihood(hidden, cases[number])))
                for text, hidden in zip(batch, self._hidden(batch), strict=True)
                for number in texts[text]
            ]
            tokens = sum(map(len, batch))
            speed = Speed(prefill_tokens=tokens, prefill_seconds=time.perf_counter() - start)
            self.cost = self.cost.add(speed, len(scored), 0)
            yield from scored

    @torch.inference_mode()
    def _hidden(self, texts: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """Final hidden states of each text, [L, hidden_size]."""
        device, lengths = self._model.output_embedding.device, [len(text) for text in texts]
        tokens = torch.tensor([token for text in texts for token in text], device=device)
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        positions = document_positions(offsets, len(tokens))
        return self._model(tokens, positions, offsets, max(lengths)).hidden.split(lengths)

    @torch.inference_mode()
    def _likelihood(self, hidden: Tensor, case: Case) -> Scored:
        """How likely the expected tokens are, by the hidden states of the whole text."""
        expected = torch.tensor(case.expected, device=hidden.device)
        start = len(case.prompt) - 1
        return score_hidden(hidden[start : start + len(expected)], self._model.output_embedding, expected)

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
        self._method.begin()
        return Decoder(self._model, rows, capacity, self._cuda_graphs and limit > 0, self._method)

    def _scored(self, decoder: Decoder, cases: Sequence[Case]) -> Iterator[Given]:
        """The likelihoods alone."""
        for number, case in enumerate(cases):
            start, prompt = time.perf_counter(), torch.tensor(case.prompt)
            if case.whole:
                answer = Answer("", 0, None, decoder.log_probabilities(0, prompt).tolist())
            else:
                answer = _scored_answer(self._score(decoder, 0, decoder.begin(0, prompt), case))
            decoder.end(0)
            speed = Speed(prefill_tokens=len(prompt), prefill_seconds=time.perf_counter() - start)
            self._count(speed, 1, decoder)
            yield Given(number, answer)

    def _generated(
        self, decoder: Decoder, cases: Sequence[Case], stop: StopConfig, sampling: SamplingConfig
    ) -> Iterator[Given]:
        """Answers, and the likelihoods of those that are expected."""
        scored: dict[int, Answer] = {}

        def begun(number: int, row: int, logits: Tensor) -> None:
            if cases[number].expected:
                scored[number] = _scored_answer(self._score(decoder, row, logits, cases[number]))

        config, device = self._model.config, self._model.output_embedding.device
        sampler = Sampler(sampling, decoder.batch_size, config.vocab_size, device)
        loop = Generation(decoder, sampler, self._tokenizer, self._end_tokens, stop, begun)
        texts = [""] * len(cases)
        for piece in loop.run([case.prompt for case in cases], [case.seed for case in cases]):
            number = piece.prompt
            texts[number] += piece.text
            if piece.finish is not None:
                known = scored.get(number, Answer("", 0, None))
                yield Given(number, known._replace(text=texts[number], tokens=len(piece.tokens), finish=piece.finish))
        self._count(loop.speed, len(cases), decoder)

    def _count(self, speed: Speed, cases: int, decoder: Decoder) -> None:
        """Add to the cost."""
        dtype = self._model.output_embedding.dtype
        cache_bytes = self._method.cache_bytes(self._model.config, decoder.cache.capacity, dtype)
        self.cost = self.cost.add(speed, cases, cache_bytes)

    def _score(self, decoder: Decoder, row: int, logits: Tensor, case: Case) -> Scored:
        """How likely the expected tokens are; the row is left as it was."""
        saved = self._method.save(row)
        with self._method.answering():
            found = decoder.score(row, logits, torch.tensor(case.expected))
        self._method.restore(row, saved)
        return found


def _scored_answer(scored: Scored) -> Answer:
    return Answer("", 0, None, scored.log_probs.tolist(), bool(scored.likeliest.all()))


def _batches(texts: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Texts in their order, together up to so many tokens, one at least."""
    batch: list[tuple[int, ...]] = []
    for text in texts:
        if batch and sum(map(len, batch)) + len(text) > tokens:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
