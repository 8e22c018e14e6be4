"""What reading checkpoints needs of torch that it does not promise; tests/checkpoint/test_compat.py checks it."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as storage
from torch.distributed.checkpoint.filesystem import FileSystemReader


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the types of a checkpoint's table of contents and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """The named type.

        Raises:
            pickle.UnpicklingError: it is none of those.
        """
        found = super().find_class(module, name) if module.split(".", maxsplit=1)[0] in ("torch", "pathlib") else None
        described = isinstance(found, type) and found.__module__ in (storage.__name__, "pathlib")
        known = (module, name) in (
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
        )
        if described or known or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"a checkpoint's table of contents holds {module}.{name}")


class SafeReader(FileSystemReader):
    """Torch's reader of sharded checkpoints, which unpickles their table of contents without restraint, with one."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> storage.Metadata:
        """Read `.metadata`."""
        with Path(self.path, ".metadata").open("rb") as file:
            contents: storage.Metadata = _MetadataUnpickler(file).load()
        contents.storage_meta = contents.storage_meta or storage.StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents
