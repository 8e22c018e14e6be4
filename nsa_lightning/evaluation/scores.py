"""How answers are counted, where no library counts it as it was published."""

import re
import string
from collections import Counter
from collections.abc import Sequence


def share_found(values: Sequence[str], answer: str) -> float:
    """The share of values that stand in the answer, upper or lower case (`string_match_all` of RULER)."""
    return sum(value.lower() in answer.lower() for value in values) / len(values)


def any_found(values: Sequence[str], answer: str) -> float:
    """1 where any of the values stands in the answer, else 0 (`string_match_part` of RULER)."""
    return float(any(value.lower() in answer.lower() for value in values))


def question_f1(answer: str, right: str) -> float:
    """F1 of the words of an English answer, without articles, punctuation and case, as SQuAD counts it."""
    return overlap_f1(normalised_words(answer), normalised_words(right))


def normalised_words(text: str) -> list[str]:
    """Words in small letters, without ASCII punctuation and the articles a, an and the."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def overlap_f1(found: Sequence[str], right: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands."""
    common = sum((Counter(found) & Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else 0.0
