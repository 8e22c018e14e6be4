"""Paths as users write them."""

import os
import re
from pathlib import Path

from nsa_kernels.errors import SettingError

_VARIABLE = re.compile(r"\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})")


def expand_path(path: str) -> str:
    """A path or URL with `~`, `~user`, `$VAR` and `${VAR}` replaced, once, as a shell does.

    What exists under the name as it is written keeps it: a `$` may be part of a name.

    Raises:
        SettingError: it names a user or a variable that does not exist.
    """
    tilde = os.path.expanduser(path)  # noqa: PTH111 (a URL is no path)
    missing = [name for name in _VARIABLE.findall(tilde) if name.strip("{}") not in os.environ]
    if (missing or tilde.startswith("~")) and not Path(path).exists():
        what = f"the variable ${missing[0]}, which is not set" if missing else f"the user {tilde.split('/')[0]}"
        raise SettingError(f"the path {path} must name what exists, got {what}")
    return _VARIABLE.sub(lambda found: os.environ.get(found[1].strip("{}"), found[0]), tilde)


def relative(path: str | Path) -> Path:
    """The path as one would type it from here."""
    path, here = Path(path), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
