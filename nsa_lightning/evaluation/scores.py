"""How answers are counted, where no library counts it as it was published."""

from collections.abc import Sequence


def share_found(values: Sequence[str], answer: str) -> float:
    """The share of values that stand in the answer, upper or lower case (`string_match_all` of RULER)."""
    return sum(value.lower() in answer.lower() for value in values) / len(values)


def any_found(values: Sequence[str], answer: str) -> float:
    """1 where any of the values stands in the answer, else 0 (`string_match_part` of RULER)."""
    return float(any(value.lower() in answer.lower() for value in values))
