"""Settings are checked against the types that they are declared with, as the command line checks them.

One check for every config class and for the arguments of classes that take settings: it reads the type hints.
"""

import math
import os
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nsa_kernels.errors import SettingError


def check_types(config: Any, prefix: str = "") -> None:
    """Refuse a config whose fields have values of other types, or names that are none of the choices.

    Args:
        config: a dataclass; called first in its `__post_init__`, so that its own rules meet the right types.
        prefix: how its settings are called before their own names, such as `rope.`.

    Raises:
        ValueError: the first field that does not fit, the rule and the value.
    """
    owner: Any = type(config)
    hints = _hints(owner)
    _check({field.name: getattr(config, field.name) for field in fields(config)}, hints, prefix)


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any], prefix: str = "") -> None:
    """The same for the arguments of a function.

    Args:
        function: whose parameters have type hints.
        values: its arguments by name, such as its `locals()`; what is no parameter is left alone.
        prefix: as above.
    """
    hints = _hints(function)
    _check({name: values[name] for name in hints if name in values}, hints, prefix)


@cache
def _hints(of: Any) -> dict[str, Any]:
    return get_type_hints(of)


def _check(values: Mapping[str, Any], hints: Mapping[str, Any], prefix: str) -> None:
    for name, value in values.items():
        if not _fits(value, hints[name]):
            raise SettingError(f"{prefix}{name} must be {_described(hints[name])}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type. Types that say nothing about values, such as Any, fit everything."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in parts)
    if origin in _SCALARS:
        return _SCALARS[origin][1](value)
    if not isinstance(origin, type) or origin is Any:
        return True
    if issubclass(origin, Collection):
        return _fits_collection(value, origin, parts)
    return isinstance(value, origin)


def _fits_collection(value: Any, origin: Any, parts: tuple[Any, ...]) -> bool:
    """Lists and tuples stand for each other, as YAML has no tuples; a string is none of them."""
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(all(map(_fits, pair, parts)) for pair in value.items() if parts)
    if isinstance(value, (str, bytes)) or not isinstance(value, (list, tuple, origin)):
        return False
    if issubclass(origin, tuple) and parts and parts[-1] is not Ellipsis:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return not parts or all(_fits(one, parts[0]) for one in value)


def _is_number(value: Any, *of: type) -> bool:
    number = isinstance(value, of) and not isinstance(value, bool)  # True is an int in Python
    return number and (isinstance(value, int) or math.isfinite(value))


def _described(hint: Any) -> str:
    """What a value must be, in words."""
    origin, parts = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, parts))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in _SCALARS:
        return _SCALARS[origin][0]
    if isinstance(origin, type) and issubclass(origin, Collection):
        return _described_collection(origin, parts)
    name = getattr(origin, "__name__", str(origin))
    return f"of type {name}"


def _described_collection(origin: type, parts: tuple[Any, ...]) -> str:
    words = list(map(_described, (part for part in parts if part is not Ellipsis)))
    if issubclass(origin, Mapping):
        return f"a mapping from {words[0]} to {words[1]}" if words else "a mapping"
    if issubclass(origin, tuple) and len(words) == len(parts) > 0:
        return f"a list of {len(parts)} values, each {words[0]}"
    return f"a list of values that are each {words[0]}" if words else "a list"


_SCALARS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", lambda value: _is_number(value, int)),
    float: ("a finite number", lambda value: _is_number(value, int, float)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    str: ("a string", lambda value: isinstance(value, (str, os.PathLike))),
    types.NoneType: ("none", lambda value: value is None),
}
"""What a value of a type is called, and how it is known."""
