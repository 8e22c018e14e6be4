"""How Lightning writes and reads the checkpoints of one file."""

from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import TorchCheckpointIO

from nsa_lightning.checkpoint.atomic import save_file
from nsa_lightning.checkpoint.sharded import read_whole
from nsa_lightning.checkpoint.summary import read_summary


class RunCheckpointIO(TorchCheckpointIO):
    """Checkpoints of one file, replaced in one step; a sharded directory is read as if it were one.

    Lightning's own holds the whole file in memory, and goes through another file system if the system's directory for
    temporary files is on one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write one file."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_file(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a file or a directory; tensors and plain types only."""
        if Path(path).is_dir():
            read_summary(Path(path))
            return read_whole(Path(path))
        return super().load_checkpoint(path, *args, **kwargs | {"weights_only": True})
