"""A sharded checkpoint as one file."""

from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.checkpoint.atomic import save_file
from nsa_lightning.checkpoint.run_files import KEY, read_run_files
from nsa_lightning.checkpoint.sharded import read_whole
from nsa_lightning.checkpoint.summary import read_summary


def consolidate(checkpoint: Path, output: Path) -> None:
    """Write a sharded checkpoint as one file with the files of its run inside; arguments as `nsa consolidate` has them.

    Raises:
        ValueError: the directory is no complete checkpoint, or the file exists or cannot be written.
    """
    if not checkpoint.is_dir():
        raise SettingError(f"checkpoint must be a directory of nsa fit, got {checkpoint}")
    if output.exists():
        raise SettingError(f"output must not exist, got {output}")
    read_summary(checkpoint, "checkpoint")
    save_file(read_whole(checkpoint) | {KEY: read_run_files(checkpoint)}, output)
