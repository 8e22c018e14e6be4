"""The environment that `make demo` makes, within one that has the development packages too.

Which packages are installed changes what Python does: `typing` hands out the union that was written first, and
libraries look for others that they can use.
"""

import importlib.machinery
import os
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VARIABLE = "NSA_TEST_PLAIN_ENVIRONMENT"
"""Set to 1 it has the tests run without the packages that `nsa-lightning` does not depend on, pytest's own left."""

_PACKAGE = "nsa-lightning"


def hide_development_packages() -> None:
    """Have Python find neither the modules nor the metadata of what the package does not depend on."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in metadata.distributions()}
    hidden = installed.keys() - _needed(installed)
    modules = {
        module
        for module, names in metadata.packages_distributions().items()
        if all(canonicalize_name(name) in hidden for name in names)
    }
    testing = {name for name in modules if name in sys.modules or name.startswith(("_pytest", "pytest", "xdist"))}

    class PlainFinder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, name, path=None, target=None):
            return None if name.partition(".")[0] in modules - testing else super().find_spec(name, path, target)

        @classmethod
        def find_distributions(cls, *context):
            found = super().find_distributions(*context)
            return (each for each in found if canonicalize_name(each.metadata["Name"]) not in hidden)

    sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = PlainFinder


def plain_environment() -> dict[str, str]:
    """Environment variables of a process of pytest that is to run as `make demo` does."""
    return os.environ | {VARIABLE: "1"}


def _needed(installed: dict[str, metadata.Distribution]) -> set[str]:
    """What the package depends on, without its extras, and all that this depends on."""
    seen = set(_requirements(_PACKAGE, frozenset(), installed))
    todo = list(seen)
    while todo:
        new = set(_requirements(*todo.pop(), installed)) - seen
        seen |= new
        todo += new
    return {_PACKAGE} | {name for name, _ in seen}


def _requirements(
    name: str, extras: frozenset[str], installed: dict[str, metadata.Distribution]
) -> Iterator[tuple[str, frozenset[str]]]:
    for text in (installed[name].requires or []) if name in installed else []:
        required = Requirement(text)
        if required.marker is None or any(required.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(required.name), frozenset(required.extras)
