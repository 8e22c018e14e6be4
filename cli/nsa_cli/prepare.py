"""`nsa prepare`: sources to a prepared set."""

import sys

from nsa_cli.function_command import run_function
from nsa_lightning.data.prepare import prepare_set


def run() -> int:
    """Prepare what `sys.argv` says; returns the exit status, 2 for a mistake in the settings."""
    return run_function("prepare", prepare_set, sys.argv[2:] or ["--help"])
