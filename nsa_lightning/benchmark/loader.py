"""`nsa bench loader`: how fast batches of a prepared set reach the training, and how well they are packed."""

import multiprocessing
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nsa_kernels.errors import SettingError

from nsa_lightning.data.sets import Packing, open_set

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_lightning.data.dataset import PackedSplit
    from nsa_lightning.data.token_store import TokenStore

_HEADER = (
    "packing, seq_len", "sequences", "padding", "cut documents", "plan s", "first batch s", "M tokens/s", "worker MB",
)  # fmt: skip


def bench_loader(
    *,
    prepared: str,
    packings: list[Packing] = ["sequential", "best_fit"],  # noqa: B006 - read only; jsonargparse shows it
    seq_lens: list[int] = [8192, 32768, 131072],  # noqa: B006
    batch_size: int = 1,
    num_workers: int = 1,
    tokens: int = 2**27,
) -> int:
    """Pack the training split of a prepared set and time its batches, as `nsa fit` gets them.

    Prints a table: sequences, share of padding, documents that are cut, seconds until the sequences are planned and
    from there to the first batch, tokens a second after it, and the memory that the largest worker has for itself.

    Args:
        prepared: directory or URL of the set.
        packings: how documents are laid in sequences.
        seq_lens: tokens in a sequence.
        batch_size: sequences in a batch.
        num_workers: processes that make batches; 0 makes them in this one.
        tokens: how many are read to measure the speed, at most an epoch.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: a setting that cannot be measured, or the set cannot be read.
    """
    for name, least, value in (
        ("seq_lens", 2, min(seq_lens, default=2)), ("batch_size", 1, batch_size), ("num_workers", 0, num_workers),
    ):  # fmt: skip
        if value < least:
            raise SettingError(f"{name} must be at least {least}, got {value}")
    from nsa_lightning.benchmark.report import text_table

    with TemporaryDirectory() as folder:
        store = open_set("prepared", prepared, Path(folder))
        if not store.manifest.splits["train"].documents:
            raise SettingError(f"prepared must have training documents, {prepared} has none")
        rows = [
            _measure(store, packing, seq_len, Path(folder), batch_size, num_workers, tokens)
            for packing in packings
            for seq_len in seq_lens
        ]
    size = store.manifest.splits["train"]
    print(f"{prepared}: {size.documents:,} training documents, {size.tokens:,} tokens\n\n{text_table(_HEADER, rows)}")
    return 0


def _measure(
    store: "TokenStore", packing: Packing, seq_len: int, folder: Path, batch_size: int, num_workers: int, tokens: int
) -> tuple[str, ...]:
    from nsa_lightning.data.dataset import PackedSplit

    print(f"nsa bench loader: {packing}, {seq_len}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    split = PackedSplit(store, "train", seq_len, packing, folder)
    planned = time.perf_counter() - start
    first, speed, memory = _stream(split, batch_size, num_workers, tokens)
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


def _stream(split: "PackedSplit", batch_size: int, num_workers: int, tokens: int) -> tuple[float, float, int]:
    """Seconds to the first batch, tokens a second after it, bytes of the largest worker."""
    import numpy as np

    from nsa_lightning.data.dataset import PackedDataset
    from nsa_lightning.data.loader import PackedLoader
    from nsa_lightning.data.order import Shuffled

    byte_lengths = np.ones(split.tokens.store.manifest.vocab_size, dtype=np.int64)
    dataset = PackedDataset([split], Shuffled([split.plan.num_sequences], {"": 1.0}, seed=0), byte_lengths, padding=0)
    loader = PackedLoader(dataset, batch_size=batch_size, num_workers=num_workers)
    start = time.perf_counter()
    batches = iter(loader)
    next(batches)
    first = time.perf_counter()
    read = 0
    for batch in batches:
        read += len(batch.tokens)
        if read >= tokens:
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
