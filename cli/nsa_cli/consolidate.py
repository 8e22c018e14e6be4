"""`nsa consolidate`: a sharded checkpoint as one file."""

import sys
from pathlib import Path

from nsa_cli.function_command import run_function
from nsa_lightning.checkpoint.consolidate import consolidate


def consolidate_checkpoint(checkpoint: str, output: str) -> int:
    """Write a sharded checkpoint as one file, with the optimizer's state; it passes through host memory.

    The file keeps the tokenizer and the config of its run: `nsa generate` and `nsa export` read it anywhere.

    Args:
        checkpoint: directory that `nsa fit` wrote with `--trainer.strategy fsdp2`.
        output: file to write; its directory is made if there is none.

    Returns:
        0.

    Raises:
        ValueError: the directory is no complete checkpoint, or the file exists.
    """
    consolidate(Path(checkpoint), Path(output))
    print(f"{output}: {Path(output).stat().st_size / 1e9:.2f} GB")
    return 0


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    return run_function(
        "consolidate", consolidate_checkpoint, sys.argv[2:] or ["--help"], paths=("checkpoint", "output")
    )
