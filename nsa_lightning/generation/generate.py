"""The decoding loop: prompts take the rows of a batch in turns, and every step gives each of them a token."""

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor

from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.generation.sampling import Sampler
from nsa_lightning.generation.text_stream import TextStream

Finish = Literal["end", "stop", "length"]
"""Why an answer ends: the model ended it, a stop string came, or it has max_new_tokens."""


@dataclass(frozen=True, kw_only=True)
class StopConfig:
    """Where an answer ends.

    Raises:
        ValueError: max_new_tokens is not positive, or a stop string is empty.
    """

    max_new_tokens: int = 256
    """Longest answer, tokens."""

    stop: Sequence[str] = ()
    """Strings that end an answer and are not part of it."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if "" in self.stop:
            raise SettingError(f"stop must hold no empty string, got {list(self.stop)}")


class Piece(NamedTuple):
    """What a token adds to the answer of one prompt."""

    prompt: int  # its number
    text: str
    tokens: list[int]  # of the answer so far
    finish: Finish | None  # None: the answer goes on


@dataclass
class Speed:
    """Tokens and seconds of both phases."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        prefill = self.prefill_tokens / max(self.prefill_seconds, 1e-9)
        decode = self.decode_tokens / max(self.decode_seconds, 1e-9)
        return (
            f"prefill {self.prefill_tokens} tokens, {prefill:.1f} tokens/s; "
            f"decode {self.decode_tokens} tokens, {decode:.1f} tokens/s"
        )


class _Answer:
    """The answer to one prompt as it grows."""

    def __init__(self, prompt: int, stream: TextStream) -> None:
        self.prompt, self.stream = prompt, stream
        self.tokens: list[int] = []


class Generation:
    """The decoding loop.

    Args:
        decoder: its capacity holds every prompt with max_new_tokens.
        sampler: of as many rows.
        tokenizer: of the model.
        end_tokens: tokens that end an answer and are not part of it.
        stop: where else answers end.
        begun: called with each prompt's number, its row and the logits [V] behind it, before its answer begins.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        tokenizer: Tokenizer,
        end_tokens: Collection[int],
        stop: StopConfig,
        begun: Callable[[int, int, Tensor], None] | None = None,
    ) -> None:
        self._decoder, self._sampler, self._tokenizer = decoder, sampler, tokenizer
        self._end_tokens, self._stop, self._begun = end_tokens, stop, begun
        self._rows: list[_Answer | None] = [None] * decoder.batch_size
        self.speed = Speed()

    def run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None) -> Iterator[Piece]:
        """Continue prompts, tokens of each; yields pieces of their answers as they come, in any order of the prompts.

        A row whose answer has ended takes the next prompt that waits.

        Args:
            prompts: tokens of each.
            seeds: of each prompt's random numbers; left out, all have the sampler's.
        """
        waiting = deque((number, prompt, seeds[number] if seeds else None) for number, prompt in enumerate(prompts))
        while True:
            for row in range(len(self._rows)):
                while self._rows[row] is None and waiting:
                    yield self._begin(row, *waiting.popleft())
            if not any(self._rows):
                return
            yield from self._step()

    def _begin(self, row: int, number: int, prompt: Sequence[int], seed: int | None) -> Piece:
        """Give a row to a prompt."""
        start, tokens = time.perf_counter(), torch.tensor(prompt)
        self._sampler.begin(row, tokens, seed)
        logits = self._decoder.begin(row, tokens)
        (token,) = self._sampler.choose(logits[None], [row])
        self.speed.prefill_seconds += time.perf_counter() - start
        self.speed.prefill_tokens += len(prompt)
        if self._begun is not None:
            self._begun(number, row, logits)
        self._rows[row] = _Answer(number, TextStream(self._tokenizer, prompt, self._stop.stop))
        return self._add(row, token)

    def _step(self) -> Iterator[Piece]:
        """One more token of every answer."""
        start = time.perf_counter()
        logits = self._decoder.step([answer.tokens[-1] if answer is not None else 0 for answer in self._rows])
        active = [row for row, answer in enumerate(self._rows) if answer is not None]
        tokens = self._sampler.choose(logits[active], active)
        self.speed.decode_seconds += time.perf_counter() - start
        self.speed.decode_tokens += len(active)
        for row, token in zip(active, tokens, strict=True):
            yield self._add(row, token)

    def _add(self, row: int, token: int) -> Piece:
        """Append a token to the answer in a row, or end it; the end frees the row."""
        answer = self._rows[row]
        assert answer is not None
        finish: Finish | None = "end" if token in self._end_tokens else None
        text = ""
        if finish is None:
            answer.tokens.append(token)
            text = answer.stream.push(token)
            finish = "length" if len(answer.tokens) == self._stop.max_new_tokens else None
        if finish is not None:
            text += answer.stream.finish()
        if answer.stream.stopped:
            finish = "stop"
        if finish is not None:
            self._decoder.end(row)
            self._rows[row] = None
        return Piece(answer.prompt, text, answer.tokens, finish)
