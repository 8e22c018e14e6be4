"""`nsa consolidate`: a sharded checkpoint as one file."""

import sys
from pathlib import Path

from jsonargparse import auto_cli

from nsa_cli.errors import print_error
from nsa_lightning.training.checkpoints import read_summary, save_file
from nsa_lightning.training.sharded_checkpoint import read_whole


def consolidate(checkpoint: str, output: str) -> None:
    """Write a sharded checkpoint as one file, with the optimizer's state; it passes through host memory.

    Args:
        checkpoint: directory that `nsa fit` wrote with `--trainer.strategy fsdp2`.
        output: file to write.

    Raises:
        ValueError: the directory is no complete checkpoint, or the file exists.
    """
    if not Path(checkpoint).is_dir():
        raise ValueError(f"checkpoint must be a directory of nsa fit, got {checkpoint}")
    if Path(output).exists():
        raise ValueError(f"output must not exist, got {output}")
    read_summary(Path(checkpoint))
    save_file(read_whole(Path(checkpoint)), Path(output))
    print(f"{output}: {Path(output).stat().st_size / 1e9:.2f} GB")


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake."""
    try:
        auto_cli(consolidate, args=sys.argv[2:], prog="nsa consolidate", as_positional=False)
    except ValueError as error:
        print_error("consolidate", str(error))
        return 2
    return 0
