"""`nsa bench loader`: how fast batches of a prepared set reach the training, and how well they are packed."""

import multiprocessing
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.benchmark.results import Report
from nsa_lightning.data.sets import Packing, open_set

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_lightning.data.dataset import PackedSplit
    from nsa_lightning.data.token_store import TokenStore

_HEADER = (
    "packing, seq_len", "sequences", "padding", "cut documents", "plan s", "first batch s", "M tokens/s", "worker MB",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """The settings of `nsa bench loader`.

    Raises:
        ValueError: a setting that cannot be measured.
    """

    prepared: str
    """Directory or URL of the set."""

    packings: list[Packing] = field(default_factory=lambda: ["sequential", "best_fit"])
    """How documents are laid in sequences."""

    seq_lens: list[int] = field(default_factory=lambda: [8192, 32768, 131072])
    """Tokens in a sequence."""

    batch_size: int = 1
    """Sequences in a batch."""

    num_workers: int = 1
    """Processes that make batches; 0 makes them in this one."""

    tokens: int = 2**27
    """How many are read to measure the speed, at most an epoch."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least, value in (
            ("seq_lens", 2, min(self.seq_lens, default=2)), ("batch_size", 1, self.batch_size),
            ("num_workers", 0, self.num_workers),
        ):  # fmt: skip
            if value < least:
                raise SettingError(f"{name} must be at least {least}, got {value}")


def bench_loader(settings: LoaderSettings, progress: Report) -> str:
    """Pack the training split of a prepared set and time its batches, as `nsa fit` gets them.

    Args:
        settings: what is measured.
        progress: is told what is done next.

    Returns:
        A table.

    Raises:
        ValueError: the set cannot be read, or has no training documents.
    """
    from nsa_lightning.text_table import text_table

    prepared = settings.prepared
    with TemporaryDirectory() as folder:
        store = open_set("prepared", prepared, Path(folder))
        size = store.manifest.splits["train"]
        if not size.documents:
            raise SettingError(f"prepared must have training documents, {prepared} has none")
        rows = []
        for packing, seq_len in product(settings.packings, settings.seq_lens):
            progress(f"{packing}, {seq_len}")
            rows.append(_measure(store, packing, seq_len, Path(folder), settings))
    return f"{prepared}: {size.documents:,} training documents, {size.tokens:,} tokens\n\n{text_table(_HEADER, rows)}"


def _measure(
    store: "TokenStore", packing: Packing, seq_len: int, folder: Path, settings: LoaderSettings
) -> tuple[str, ...]:
    from nsa_lightning.data.dataset import PackedSplit

    start = time.perf_counter()
    split = PackedSplit(store, "train", seq_len, packing, folder)
    planned = time.perf_counter() - start
    first, speed, memory = _stream(split, settings)
    size = split.plan.num_sequences
    return (
        f"{packing}, {seq_len}",
        f"{size:,}",
        f"{split.num_padding / (size * seq_len):.3%}",
        f"{split.plan.cut_documents():,}",
        f"{planned:.2f}",
        f"{first:.2f}",
        f"{speed / 1e6:.1f}" if speed else "-",
        f"{memory / 2**20:.0f}" if memory else "-",
    )


def _stream(split: "PackedSplit", settings: LoaderSettings) -> tuple[float, float, int]:
    """Seconds to the first batch, tokens a second after it, bytes of the largest worker."""
    import numpy as np

    from nsa_lightning.data.dataset import PackedDataset
    from nsa_lightning.data.loader import PackedLoader
    from nsa_lightning.data.order import Shuffled

    byte_lengths = np.ones(split.tokens.store.manifest.vocab_size, dtype=np.int64)
    dataset = PackedDataset([split], Shuffled([split.plan.num_sequences], {"": 1.0}, seed=0), byte_lengths, padding=0)
    loader = PackedLoader(dataset, batch_size=settings.batch_size, num_workers=settings.num_workers)
    start = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    read = 0
    for batch in batches:
        read += len(batch.tokens)
        if read >= settings.tokens:
            break
    elapsed = time.perf_counter() - first
    memory = max((_private_bytes(worker.pid) for worker in multiprocessing.active_children()), default=0)
    loader.close()
    return first - start, read / elapsed, memory


def _private_bytes(pid: int | None) -> int:
    """Memory that a process shares with no other; 0 where the system does not tell."""
    path = Path(f"/proc/{pid}/smaps_rollup")
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return sum(int(words[1]) * 1024 for words in lines if words[0].startswith("Private_"))
