"""The text that needles are hidden in: sentences of a generator, one passage again and again, or a user's text."""

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.evaluation.words import sentence
from nsa_lightning.paths import expand_path

KINDS = ("filler", "repeat")
_REPEATED = (
    "The rain has stopped for now.",
    "A bus waits at the corner.",
    "Nobody is in a hurry.",
    "The street is quiet again.",
)
_SENTENCE = re.compile(r"[^.!?。！？\n]*(?:[.!?。！？]+[\"'”’)\]]*|\n|$)\s*")
_LONGEST = 600  # characters of a sentence: a text without full stops is cut there


class Haystack:
    """Sentences in an endless order that is the same each time.

    Args:
        source: `filler`, `repeat`, or the path of a text file; a text that is too short begins anew.
        seed: of the filler.

    Raises:
        ValueError: the file cannot be read, or holds no text.
    """

    def __init__(self, source: str, seed: int) -> None:
        self._draw = random.Random(seed)
        self._sentences: list[str] = []
        self._given: Sequence[str] = _REPEATED
        self.identity = f"filler {seed}" if source == "filler" else source
        """Changes with the text."""
        if source not in KINDS:
            text = _read(Path(expand_path(source)))
            self._given = [piece for found in _SENTENCE.findall(text) for piece in _pieces(found.strip())]
            self.identity = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self._generated = source == "filler"

    def sentences(self, count: int) -> list[str]:
        """The first sentences."""
        while len(self._sentences) < count:
            number = len(self._sentences)
            fresh = sentence(self._draw) if self._generated else self._given[number % len(self._given)]
            self._sentences.append(fresh)
        return self._sentences[:count]


def fit_sentences(count_tokens: Callable[[int], int], tokens: int, guess: int | None = None) -> int:
    """The most pieces of text whose prompt has at most so many tokens.

    Args:
        count_tokens: tokens of a prompt with so many pieces; grows with them.
        tokens: the most tokens.
        guess: about how many will fit; a good one saves time.

    Returns:
        0 where not even one piece fits.
    """
    low, high, guess = 0, tokens, guess or max(tokens // 16, 1)  # `low` fits, more than `high` do not: each has a token
    while low < high:
        guess = min(max(guess, low + 1), high)
        found = count_tokens(guess)
        low, high = (guess, high) if found <= tokens else (low, guess - 1)
        # The next guess is by proportion; a step beyond it keeps the search from creeping up on the end.
        guess = guess * tokens // max(found, 1) + (0 if found > tokens else 1)
    return low


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        kinds = ", ".join(KINDS)
        raise SettingError(f"haystack must be one of {kinds} or a text file, got {path}: {error}") from error
    if not text.strip():
        raise SettingError(f"haystack must hold text, {path} has none")
    return text


def _pieces(text: str) -> list[str]:
    return [text[start : start + _LONGEST] for start in range(0, len(text), _LONGEST)]
