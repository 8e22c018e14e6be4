"""What the user reads when a command ends in a mistake."""

import sys
import traceback

_OWN_PACKAGES = ("nsa_kernels", "nsa_lightning", "nsa_cli")


def print_error(command: str, message: str) -> None:
    """One line on stderr, after the command that the user typed."""
    print(f"nsa {command}: error: {message}", file=sys.stderr)


def raised_by_own_code(error: Exception) -> bool:
    """Whether our own code raised it, so that its message was written for the user."""
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    return innermost.f_globals.get("__name__", "").startswith(_OWN_PACKAGES)
