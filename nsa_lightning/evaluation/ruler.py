"""The tasks of RULER beside its needles (arXiv:2404.06654), made at any length.

ruler_variables      a chain of assignments among the sentences: which variables have the first one's value?
ruler_common_words   a numbered list in which ten words stand far more often than the others: which?
ruler_frequent_words made-up words whose frequencies fall as those of a language do: which three stand most often?
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.evaluation.case import GREEDY, Answer, Case, PlannedCase, mean_log_probability
from nsa_lightning.evaluation.haystack import Haystack, fit_sentences
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.scores import share_found
from nsa_lightning.evaluation.words import compound, distinct, made_up
from nsa_lightning.generation.generate import StopConfig

RULER_KINDS = ("variables", "common_words", "frequent_words")
_NEW_TOKENS = {"variables": 30, "common_words": 120, "frequent_words": 50}
"""Longest answers, as published; more where the words of the answer have more tokens."""

_COMMON, _COMMON_TIMES, _OTHER_TIMES = 10, 30, 3
_ASKED = 3  # frequent words
_NAME_LETTERS = 5  # of a variable


@dataclass(frozen=True, kw_only=True)
class RulerConfig:
    """Variable tracking, common words and frequent words.

    Raises:
        ValueError: a value is out of range.
    """

    samples: int = 5
    """Cases of each task and length."""

    chains: int = 1
    """Chains of assignments in a text, each with its own value; the first is asked for."""

    hops: int = 4
    """Assignments of a chain behind its first."""

    exponent: float = 2.0
    """The word of rank r stands as often as r to the power of minus this."""

    haystack: str = "repeat"
    """What assignments stand among: `filler`, `repeat` or a text file."""

    seed: int = 0
    """Draws names, values and words."""

    def __post_init__(self) -> None:
        check_types(self, "ruler.")
        for name in ("samples", "chains", "hops"):
            if getattr(self, name) < 1:
                raise SettingError(f"ruler.{name} must be at least 1, got {getattr(self, name)}")
        if not self.exponent > 1:
            raise SettingError(f"ruler.exponent must be above 1, got {self.exponent}")


class _Question(NamedTuple):
    """Everything but the length."""

    text: str
    beginning: str  # of the answer
    answers: list[str]


class RulerTask:
    """One of the three.

    Args:
        kind: `variables`, `common_words` or `frequent_words`.
        config: how each is made.
        lengths: tokens of prompt and answer together.
        form: of the prompt.

    Raises:
        ValueError: the haystack cannot be read.
    """

    sampling = GREEDY
    stop = StopConfig()

    def __init__(self, kind: str, config: RulerConfig, lengths: Sequence[int], form: PromptForm) -> None:
        self.name = f"ruler_{kind}"
        self._kind, self._config, self._lengths, self._form = kind, config, lengths, form
        self._haystack = Haystack(config.haystack, config.seed)
        own = {name: value for name, value in asdict(config).items() if name != "samples"}
        self.settings: Mapping[str, Any] = own | {"haystack": self._haystack.identity, "form": form.name}

    def cases(self) -> list[PlannedCase]:
        """By length and sample."""
        return [
            PlannedCase(f"{length}/{sample}", length, None, partial(self._build, length, sample))
            for length in self._lengths
            for sample in range(self._config.samples)
        ]

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """The share of the variables or words that the answer has."""
        return {"score": share_found(case.answers, answer.text)} | mean_log_probability(answer)

    def _build(self, length: int, sample: int) -> Case:
        ask = {"variables": self._variables, "common_words": self._common, "frequent_words": self._frequent}[self._kind]

        def question(size: int) -> _Question:
            return ask(random.Random(f"{self._config.seed} {self._kind} {sample}"), size)

        expected = " " + ", ".join(question(1).answers)
        needed = len(self._form.tokenizer.encode_prompt(expected, start=False))
        answer_tokens = max(_NEW_TOKENS[self._kind], -(-needed // 32) * 32)

        def tokens(size: int) -> int:
            asked = question(size)
            return len(self._form.prompt(asked.text, self._lead(asked.beginning)))

        size = fit_sentences(tokens, length - answer_tokens)
        if size == 0:
            raise SettingError(f"lengths must leave room for the question and its answer, got {length} for {self.name}")
        asked = question(size)
        prompt, found = self._form.with_answer(asked.text, self._lead(asked.beginning), " " + ", ".join(asked.answers))
        return Case(prompt=prompt, answers=asked.answers, expected=found, max_new_tokens=answer_tokens)

    def _lead(self, beginning: str) -> str:
        return beginning if self._form.is_chat else f"\n{beginning}"

    def _variables(self, draw: random.Random, sentences: int) -> _Question:
        """Chains of assignments spread over so many sentences, in the order in which they must be read."""
        config, taken = self._config, set[str]()
        names = distinct(_variable_name, draw, config.chains * (config.hops + 1), taken)
        values = [str(draw.randrange(10000, 100000)) for _ in range(config.chains)]
        placed: list[tuple[float, str]] = []
        chains = [names[index :: config.chains] for index in range(config.chains)]
        for chain, value in zip(chains, values, strict=True):
            spots = sorted(draw.random() for _ in chain)
            sources = [value, *(f"VAR {name}" for name in chain)]
            for spot, name, source in zip(spots, chain, sources, strict=False):
                placed.append((spot, f"VAR {name} = {source}"))
        text = self._haystack.sentences(sentences)
        lines, done = [], 0
        for spot, assignment in sorted(placed):
            place = round(spot * len(text))
            lines += [*text[done:place], assignment]
            done = place
        question = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{chr(10).join([*lines, *text[done:]])}\n"
            f"Question: Find all variables that are assigned the value {values[0]} in the text above."
        )
        beginning = (
            f"Answer: According to the chain(s) of variable assignment in the text above, {config.hops + 1} variables "
            f"are assigned the value {values[0]}, they are:"
        )
        return _Question(question, beginning, chains[0])

    def _common(self, draw: random.Random, others: int) -> _Question:
        """A list in which ten words stand thirty times and so many others three times each."""
        found = distinct(compound, draw, _COMMON + others, set())
        common, rest = found[:_COMMON], found[_COMMON:]
        listed = common * _COMMON_TIMES + rest * _OTHER_TIMES
        draw.shuffle(listed)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, start=1))
        question = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{numbered}\n"
            f"Question: What are the {_COMMON} most common words in the above list?"
        )
        return _Question(question, f"Answer: The top {_COMMON} words that appear most often in the list are:", common)

    def _frequent(self, draw: random.Random, words: int) -> _Question:
        """About so many made-up words in a random order, and dots, which are noise."""
        vocabulary = distinct(made_up, draw, 500, set())
        counts = _zeta_counts(words, len(vocabulary), self._config.exponent)
        coded = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        coded += ["..."] * (words // 8)
        draw.shuffle(coded)
        question = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(coded)}\n"
            "Question: Do not provide any explanation. Please ignore the dots "
            "'....'. What are the three most frequently appeared words in the above coded text?"
        )
        beginning = "Answer: According to the coded text above, the three most frequently appeared words are:"
        return _Question(question, beginning, vocabulary[:_ASKED])


def _variable_name(draw: random.Random) -> str:
    return "".join(draw.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(_NAME_LETTERS))


def _zeta_counts(words: int, vocabulary: int, exponent: float) -> list[int]:
    """How often the word of each rank stands, `words` in all before rounding, the first three above all others.

    Small texts would give several ranks the same count: those that are asked for stand out by at least one.
    """
    weights = [rank**-exponent for rank in range(1, vocabulary + 1)]
    counts = [round(words * weight / sum(weights)) for weight in weights]
    for rank in range(_ASKED - 1, -1, -1):
        counts[rank] = max(counts[rank], counts[rank + 1] + 1)
    return counts
