"""`nsa consolidate`: a sharded checkpoint as one file."""

import sys

from nsa_cli.function_command import run_function
from nsa_lightning.training.checkpoints import consolidate


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    return run_function("consolidate", consolidate, sys.argv[2:] or ["--help"], paths=("checkpoint", "output"))
