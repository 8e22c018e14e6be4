"""What the user reads when a command ends in a mistake."""

import sys


def print_error(command: str, message: str) -> None:
    """One line on stderr, after the command that the user typed."""
    print(f"nsa {command}: error: {message}", file=sys.stderr)
