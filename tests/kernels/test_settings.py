"""What settings of each type accept, and how they say no."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from nsa_kernels import SettingError
from nsa_kernels.settings import check_arguments, check_types


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True)
class Settings:
    count: int = 1
    ratio: float = 0.5
    flag: bool = False
    name: str = "a"
    limit: int | None = None
    kind: Literal["a", "b"] = "a"
    kinds: list[Literal["a", "b"]] = field(default_factory=lambda: ["a"])
    names: Sequence[str] = ()
    one_or_more: Sequence[str] | str = ()
    pair: tuple[float, float] = (0.9, 0.95)
    steps: dict[int, int] | None = None
    inner: Inner = Inner()
    function: Callable[[int], int] = abs
    anything: Any = None

    def __post_init__(self):
        check_types(self, "outer.")


FITTING = [
    {"count": 0}, {"ratio": 1}, {"ratio": -2.5}, {"flag": True}, {"limit": 3}, {"limit": None}, {"kind": "b"},
    {"kinds": ["b", "a"]}, {"kinds": ("a",)}, {"kinds": []}, {"names": ["x"]}, {"one_or_more": "x"},
    {"one_or_more": ["x"]}, {"pair": [1, 2.0]}, {"steps": {0: 8}}, {"steps": {}}, {"inner": Inner(size=2)},
    {"function": len}, {"anything": (len, "x")}, {"name": Path("x")},
]  # fmt: skip


@pytest.mark.parametrize("values", FITTING, ids=str)
def test_values_of_the_declared_types_are_taken_as_they_are(values):
    assert all(getattr(Settings(**values), name) is value for name, value in values.items())


REFUSED = [
    ("count", True, "an integer"),
    ("count", 1.0, "an integer"),
    ("count", "1", "an integer"),
    ("count", None, "an integer"),
    ("ratio", True, "a finite number"),
    ("ratio", "0.5", "a finite number"),
    ("ratio", float("nan"), "a finite number"),
    ("ratio", float("inf"), "a finite number"),
    ("flag", 1, "true or false"),
    ("flag", "false", "true or false"),
    ("name", 3, "a string"),
    ("limit", "none", "an integer or none"),
    ("limit", True, "an integer or none"),
    ("kind", "A", "one of a, b"),
    ("kind", ["a"], "one of a, b"),
    ("kind", None, "one of a, b"),
    ("kinds", "a", "a list of values that are each one of a, b"),
    ("kinds", ["a", "c"], "a list of values that are each one of a, b"),
    ("kinds", {"a": 1}, "a list of values that are each one of a, b"),
    ("names", "x", "a list of values that are each a string"),
    ("names", [1], "a list of values that are each a string"),
    ("one_or_more", 1, "a list of values that are each a string or a string"),
    ("pair", (0.9,), "a list of 2 values, each a finite number"),
    ("pair", (0.9, float("nan")), "a list of 2 values, each a finite number"),
    ("steps", {"0": 8}, "a mapping from an integer to an integer or none"),
    ("steps", [(0, 8)], "a mapping from an integer to an integer or none"),
    ("inner", {"size": 1}, "of type Inner"),
    ("function", 3, "of type Callable"),
]


@pytest.mark.parametrize(("name", "value", "rule"), REFUSED, ids=str)
def test_other_values_are_refused_with_the_setting_the_rule_and_the_value(name, value, rule):
    with pytest.raises(SettingError, match=rf"^outer\.{name} must be {rule}.*, got ") as caught:
        Settings(**{name: value})
    assert str(caught.value).endswith(repr(value))
    assert "\n" not in str(caught.value)


def test_arguments_are_checked_as_fields_are_and_other_names_are_left_alone():
    def function(kind: Literal["a", "b"], options: Mapping[str, float], untyped=None) -> None:
        other = object()
        check_arguments(function, locals() | {"other": other}, "f.")

    function("a", {"x": 1}, object())
    with pytest.raises(SettingError, match=r"^f\.kind must be one of a, b, got 'c'$"):
        function("c", {})
    with pytest.raises(SettingError, match=r"^f\.options must be a mapping from a string to a finite number, got"):
        function("a", {"x": True})
