"""What a run keeps beside its checkpoints, and a checkpoint of one file that goes elsewhere keeps inside."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIG, TOKENIZER = "config.yaml", "tokenizer.json"
CHECKPOINTS = "checkpoints"
"""The directory of a run's checkpoints, where it has one for them."""
KEY = "run_files"
"""Of a checkpoint: the texts of the files, by their names."""

_NAMES = (
    CONFIG,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def directory_of_run(checkpoint: Path) -> Path:
    """Where the run that wrote a checkpoint keeps its files: beside the checkpoint or one directory above it."""
    beside = checkpoint.absolute().parent
    usual = beside.parent if beside.name == CHECKPOINTS else beside
    return next((place for place in (beside, beside.parent) if (place / TOKENIZER).is_file()), usual)


def read_run_files(checkpoint: Path) -> dict[str, str]:
    """The files of the run that wrote a checkpoint, their texts by name; none where it lies elsewhere."""
    directory = directory_of_run(checkpoint)
    if not (directory / TOKENIZER).is_file():
        return {}
    return {name: (directory / name).read_text(encoding="utf-8") for name in _NAMES if (directory / name).is_file()}


def unpack(files: Mapping[str, str]) -> TemporaryDirectory[str]:
    """Write the files into a directory that goes with the object."""
    directory = TemporaryDirectory(prefix="nsa_run_")
    for name in _NAMES:
        if name in files:
            Path(directory.name, name).write_text(files[name], encoding="utf-8")
    return directory
