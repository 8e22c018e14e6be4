"""What a run keeps beside its checkpoints, and a checkpoint of one file that goes elsewhere keeps inside."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from nsa_kernels.errors import SettingError

KEY = "run_files"
"""Of a checkpoint: the texts of the files, by their names."""

_NAMES = (
    "config.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_DEPTH = 3  # of a checkpoint below runs/name: version_N/checkpoints/last.ckpt


def files_directory(checkpoint: Path) -> Path | None:
    """Where the tokenizer of the run that wrote a checkpoint lies: beside the checkpoint or one directory above it."""
    beside = checkpoint.absolute().parent
    return next((place for place in (beside, beside.parent) if (place / "tokenizer.json").is_file()), None)


def read_run_files(checkpoint: Path) -> dict[str, str]:
    """The files of the run that wrote a checkpoint, their texts by name; none where it lies elsewhere."""
    directory = files_directory(checkpoint)
    if directory is None:
        return {}
    return {name: (directory / name).read_text(encoding="utf-8") for name in _NAMES if (directory / name).is_file()}


def unpack(files: Mapping[str, str]) -> TemporaryDirectory[str]:
    """Write the files into a directory that goes with the object."""
    directory = TemporaryDirectory(prefix="nsa_run_")
    for name in _NAMES:
        if name in files:
            Path(directory.name, name).write_text(files[name], encoding="utf-8")
    return directory


def last_of_run(directory: Path, setting: str) -> Path:
    """The whole checkpoint of a run that was written last, or the directory itself if it is a sharded one.

    Damaged ones are passed over, with a word.

    Args:
        directory: `runs/name`, one of its versions, or one with checkpoints themselves.
        setting: what the user calls it.

    Raises:
        ValueError: there is none.
    """
    from nsa_lightning.training.checkpoints import find_checkpoints, read_summary  # imports Lightning: seconds
    from nsa_lightning.training.sharded_checkpoint import META

    if (directory / META).is_file():
        return directory
    for found in find_checkpoints(directory):
        if len(found.relative_to(directory).parts) > _DEPTH:
            continue
        try:
            read_summary(found, setting)
        except SettingError as error:
            warnings.warn(f"passed over: {error}", stacklevel=2)
        else:
            return found
    raise SettingError(
        f"{setting} must be a checkpoint of nsa fit, a run's directory, or one of nsa convert, nsa export or a dense "
        f"model, got the directory {directory}, which has neither config.json nor a whole checkpoint"
    )
