"""Sources to a prepared set: planned, tokenised shard by shard, in parallel, and taken up again after a stop.

The plan is written first and the manifest last. In between every shard appears whole or not at all, so whoever comes
after a stop keeps the whole ones. What comes out depends on the plan alone, but where files change after a stop, a bad
one that is mended for example: then the shards that were whole by then, and still fit, stay as they are.
"""

import itertools
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import iter_documents
from nsa_lightning.data.plan import Plan, changes, read_plan, take_up, write_plan
from nsa_lightning.data.shards import merge_shards, parts_of_shard, read_shard, shard_path, token_dtype
from nsa_lightning.data.sources import Part
from nsa_lightning.data.splits import split_of
from nsa_lightning.data.storage import writable
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer, training_sample
from nsa_lightning.data.workers import ShardJob, tokenise_shards

TRAINING_TEXT = 2**28  # characters, of which a trained tokenizer sees a sample
MOST_WORKERS = 8

log = logging.getLogger(__name__)


def prepare(plan: Plan, path: Path, num_workers: int | None = None) -> TokenStore:
    """Do what is left to do of a plan, and open the set; one that is whole is only opened.

    Several processes may be told to prepare the same set: one works and the others wait for it.

    Args:
        plan: what to prepare.
        path: the set's directory; what an earlier call left there is kept.
        num_workers: processes that tokenise, one shard each at a time; 0 tokenises in this one, and so does any number
            where there is one shard to do. None: one a core, at most 8.

    Raises:
        ValueError: `path` holds another plan's set, a file cannot be read or written, or no document holds text.
    """
    if num_workers is not None and num_workers < 0:
        raise SettingError(f"num_workers must be at least 0, got {num_workers}")
    if not (path / "manifest.json").exists():
        with writable(path):
            path.mkdir(parents=True, exist_ok=True)
        with _alone_at(path):
            _prepare(plan, path, num_workers)
    if words := changes(plan, read_plan(plan, path), path):
        raise SettingError(words)
    return TokenStore(path)


def _prepare(plan: Plan, path: Path, num_workers: int | None) -> None:
    if (path / "manifest.json").exists():  # by now
        return
    _remove_leftovers(path)
    if (path / "plan.json").exists():
        kept = take_up(plan, path)
    else:
        kept = []
        write_plan(plan, path, kept)
    shards = plan.shards(kept)
    tokenizer = _open_tokenizer(plan, path, shards)
    job = ShardJob(
        path=path, text=plan.text, end_of_text=tokenizer.end_of_text, seed=plan.seed, block_size=plan.shard_size
    )
    dtype = token_dtype(tokenizer).name
    missing = [number for number, parts in enumerate(shards) if not _is_whole(shard_path(path, number), dtype, parts)]
    workers = min(MOST_WORKERS, _num_cores()) if num_workers is None else num_workers
    try:
        tokenise_shards(job, shards, missing, workers)
    except SettingError as error:
        whole = sum(_is_whole(shard_path(path, number), dtype, parts) for number, parts in enumerate(shards))
        raise SettingError(f"{error}; {whole} of {len(shards)} shards are whole and kept for the next run") from error
    finally:
        _remove_leftovers(path)
    merge_shards(path, len(shards), tokenizer, **plan.text.fractions)


def _open_tokenizer(plan: Plan, path: Path, shards: list[list[Part]]) -> Tokenizer:
    """The plan's tokenizer, kept in the set; one that is to be trained sees the training texts of the first shards."""
    kept = path / "tokenizer.json"
    if plan.tokenizer is not None:
        tokenizer = plan.tokenizer
    elif kept.exists():
        return load_tokenizer(str(kept))
    else:
        texts = _training_texts(plan, shards)
        tokenizer = train_tokenizer(training_sample(texts), plan.text.tokenizer.vocab_size)
    tokenizer.save(kept)
    return tokenizer


def _training_texts(plan: Plan, shards: list[list[Part]]) -> Iterator[str]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    parts = list(itertools.chain.from_iterable(shards))
    read, total = 0, min(TRAINING_TEXT, sum(part.size for part in parts))
    with tqdm(total=total, desc="read for the tokenizer", unit="B", unit_scale=True, disable=None) as bar:
        for document in iter_documents(parts, plan.text):
            if split_of(document.text, **plan.text.fractions) == "train":
                yield document.text
            bar.update(len(document.text))
            read += len(document.text)
            if read >= TRAINING_TEXT:
                return


def _is_whole(folder: Path, dtype: str, parts: Sequence[Part]) -> bool:
    """Whether `folder` is a whole shard of these parts."""
    return read_shard(folder, dtype) is not None and [each.part for each in parts_of_shard(folder)] == list(parts)


def _remove_leftovers(path: Path) -> None:
    """What a process left that was killed as it wrote."""
    with writable(path):
        for leftover in [*path.glob("*.tmp-*"), *path.glob("shards/*.tmp-*")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Wait until no other process prepares `path`; the lock of one that was killed is free."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / ".lock")
    with writable(path / ".lock"):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("another process prepares %s, waiting for it", path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
