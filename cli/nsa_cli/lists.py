"""Lists of settings as they are typed: `--lengths 8192 16384` is `--lengths [8192, 16384]`."""

import json
from collections.abc import Collection, Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin


def join_lists(words: list[str], types: Mapping[str, Any], options: Collection[str]) -> list[str]:
    """`--lengths 8192 16384` as `--lengths [8192, 16384]`, which jsonargparse reads as a list.

    With `nargs` it would take the words, but neither `[8192, 16384]` nor `[]`, nor a list where a type allows others.

    Args:
        words: of the command line.
        types: of settings, by their flags.
        options: all flags, which end a list.
    """
    joined: list[str] = []
    values: list[str] = []
    flag: str | None = None
    for word in [*words, "--"]:
        if flag is not None and not word.startswith("--") and word not in options:
            values.append(word)
            continue
        if flag is not None:
            joined.extend(_as_list(values, types[flag.removesuffix("+")]))
        name, equals, value = word.partition("=")
        kind = types.get(name.removesuffix("+"))
        joined.append(f"{name}={_as_list([value], kind)[0]}" if equals and _is_list(kind) else word)
        flag, values = (word if not equals and element_type(kind) is not None else None), []
    return joined[:-1]


def _as_list(values: list[str], kind: Any) -> list[str]:
    """The values of one flag as the one word that jsonargparse reads, or no word for none."""
    only_lists = _is_list(kind)
    if len(values) == 1 and (values[0].startswith("[") or not only_lists):
        return values
    if not values and not only_lists:
        return []
    text = [json.dumps(value) if element_type(kind) is str else value for value in values]
    return [f"[{', '.join(text)}]"]


def _is_list(kind: Any) -> bool:
    return get_origin(kind) in (list, Sequence)


def element_type(kind: Any) -> Any:
    """What a list is of that a setting's type allows; None if it allows none."""
    if _is_list(kind):
        return get_args(kind)[0]
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return next((get_args(member)[0] for member in members if _is_list(member)), None)
