"""Needles in a haystack, in the four families of RULER (arXiv:2404.06654): can the model find what it was told?

single       one key with one value
multikey     many keys with a value each, one is asked for
multivalue   one key with several values, all are asked for
multiquery   several keys with a value each, all are asked for
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, cast, get_args

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.evaluation.case import GREEDY, Answer, Case, PlannedCase, mean_log_probability
from nsa_lightning.evaluation.haystack import Haystack, fit_sentences
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.scores import share_found
from nsa_lightning.evaluation.words import compound, distinct, number, uuid
from nsa_lightning.generation.generate import StopConfig

Family = Literal["single", "multikey", "multivalue", "multiquery"]
ValueKind = Literal["number", "word", "uuid"]

_MAKE = {"number": number, "word": compound, "uuid": uuid}
_PLURAL = {"number": "numbers", "word": "words", "uuid": "UUIDs"}
_SPARE_TOKENS = 32  # of an answer beyond the values themselves

# K needles, their keys and values.


@dataclass(frozen=True, kw_only=True)
class NeedleConfig:
    """Which needles are hidden, and where.

    Raises:
        ValueError: a value is out of range, or an unknown name.
    """

    families: list[Family] = field(default_factory=lambda: cast("list[Family]", ["single"]))
    """`single`, `multikey`, `multivalue`, `multiquery`."""

    depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    """Where in the text the needle stands, 0 at the beginning and 1 at the end. The needles of `multivalue` and
    `multiquery` are spread evenly over the text from there on, around its end."""

    values: ValueKind = "number"
    """What is to be found: seven digits, two words, or a UUID."""

    needles: int = 4
    """Keys of `multikey` and `multiquery`, values of `multivalue`."""

    haystack: str = "filler"
    """`filler` sentences, `repeat` for one passage again and again, or a text file."""

    samples: int = 1
    """Cases of each family, length and depth."""

    seed: int = 0
    """Draws keys, values and filler."""

    def __post_init__(self) -> None:
        check_types(self, "needle.")
        for family in self.families:
            if family not in get_args(Family):
                raise SettingError(f"needle.families must be of {', '.join(get_args(Family))}, got {family}")
        if not self.families or not self.depths:
            raise SettingError("needle.families and needle.depths must not be empty")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise SettingError(f"needle.depths must be from 0 to 1, got {list(self.depths)}")
        for name in ("needles", "samples"):
            if getattr(self, name) < 1:
                raise SettingError(f"needle.{name} must be at least 1, got {getattr(self, name)}")


class _Needles(NamedTuple):
    """What is hidden, and what is asked for."""

    pairs: list[tuple[str, str]]  # a key and a value each
    depths: list[float]  # of each
    keys: list[str]  # asked for
    values: list[str]  # to be found, in the order of the keys


class NeedleTask:
    """Needles of one family.

    Args:
        family: which.
        config: the others are of no matter here.
        lengths: tokens of prompt and answer together.
        form: of the prompt.

    Raises:
        ValueError: the haystack cannot be read.
    """

    sampling = GREEDY
    stop = StopConfig()

    def __init__(self, family: Family, config: NeedleConfig, lengths: Sequence[int], form: PromptForm) -> None:
        self.name = f"needle_{family}"
        self._family, self._config, self._lengths, self._form = family, config, lengths, form
        self._haystack = Haystack(config.haystack, config.seed)
        self._fitting: dict[int, int] = {}  # sentences of the last text of each length
        own = {key: value for key, value in asdict(config).items() if key not in ("families", "depths", "samples")}
        self.settings: Mapping[str, Any] = own | {"haystack": self._haystack.identity, "form": form.name}

    def cases(self) -> list[PlannedCase]:
        """By length, depth and sample."""
        return [
            PlannedCase(f"{length}/{depth:g}/{sample}", length, depth, partial(self._build, length, depth, sample))
            for length in self._lengths
            for depth in self._config.depths
            for sample in range(self._config.samples)
        ]

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """The share of the values that the answer has."""
        return {"score": share_found(case.answers, answer.text)} | mean_log_probability(answer)

    def _build(self, length: int, depth: float, sample: int) -> Case:
        needles = self._needles(random.Random(f"{self._config.seed} {self._family} {depth} {sample}"), depth)
        beginning, expected = self._beginning(needles), " " + ", ".join(needles.values)
        needed = len(self._form.tokenizer.encode_prompt(expected, start=False)) + _SPARE_TOKENS
        answer_tokens = -(-needed // _SPARE_TOKENS) * _SPARE_TOKENS  # the same for all cases, which share a batch

        def question(sentences: int) -> str:
            return self._question(needles, self._haystack.sentences(sentences))

        room = length - answer_tokens
        guess = self._fitting.get(length)
        fitting = fit_sentences(lambda count: len(self._form.prompt(question(count), beginning)), room, guess)
        self._fitting[length] = fitting
        if fitting < len(needles.pairs):
            raise SettingError(
                f"lengths must leave room for the needles and the question, got {length} for {self.name}"
            )
        prompt, expected_tokens = self._form.with_answer(question(fitting), beginning, expected)
        return Case(
            prompt=prompt,
            answers=needles.values,
            expected=expected_tokens,
            max_new_tokens=answer_tokens,
        )

    def _needles(self, draw: random.Random, depth: float) -> _Needles:
        """Keys, values and places."""
        count = 1 if self._family == "single" else self._config.needles
        taken: set[str] = set()
        keys = distinct(compound, draw, 1 if self._family == "multivalue" else count, taken)
        values = distinct(_MAKE[self._config.values], draw, count, taken)
        pairs = [(keys[index % len(keys)], value) for index, value in enumerate(values)]
        if self._family == "multikey":  # the first is asked for, the others only stand about
            return _Needles(pairs, [depth, *(draw.random() for _ in pairs[1:])], keys[:1], values[:1])
        spread = [depth, *((depth + index / count) % 1 for index in range(1, count))]
        return _Needles(pairs, spread, keys, values)

    def _question(self, needles: _Needles, sentences: Sequence[str]) -> str:
        """The text with its needles between an announcement and a question, in the words of RULER."""
        kind, kinds = self._kinds(needles)
        placed = sorted((round(depth * len(sentences)), index) for index, depth in enumerate(needles.depths))
        parts, done = [], 0
        for place, index in placed:
            key, value = needles.pairs[index]
            parts += [
                *sentences[done:place],
                f"One of the special magic {_PLURAL[self._config.values]} for {key} is: {value}.",
            ]
            done = place
        text = " ".join([*parts, *sentences[done:]])
        return (
            f"Some special magic {_PLURAL[self._config.values]} are hidden within the following text. Make sure to "
            f"memorize them. I will quiz you about the {_PLURAL[self._config.values]} afterwards.\n{text}\n"
            f"{kind} special magic {kinds} for {_listed(needles.keys)} mentioned in the provided text?"
        )

    def _beginning(self, needles: _Needles) -> str:
        """Of the answer, which is given to the model."""
        one = len(needles.values) == 1
        kinds = self._config.values if one else _PLURAL[self._config.values]
        lead = "" if self._form.is_chat else "\n"
        verb = "is" if one else "are"
        return f"{lead}The special magic {kinds} for {_listed(needles.keys)} mentioned in the provided text {verb}"

    def _kinds(self, needles: _Needles) -> tuple[str, str]:
        if len(needles.values) == 1:
            return "What is the", self._config.values
        return "What are all the", _PLURAL[self._config.values]


def _listed(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
