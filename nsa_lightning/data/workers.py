"""Processes that tokenise shards, one at a time each, and the bar that shows how far they are."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Thread
from typing import NamedTuple

from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import PartRead, read_parts
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.shards import shard_path, write_shard
from nsa_lightning.data.sources import Part
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer

SMALL = 2**22  # bytes of text that are tokenised before a process has started
_REFRESH = 0.2  # seconds between looks at how far the workers are

Task = tuple[int, Sequence[Part]]
"""A shard's number and parts."""

Report = Callable[[int, int], None]
"""Is told bytes of text, as planned, and tokens, as they are done."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """How parts become shards of the set at `path`, whose tokenizer.json is there already."""

    path: Path
    text: TextSettings
    end_of_text: str
    seed: int
    block_size: int

    def tokenizer(self) -> Tokenizer:
        """The set's tokenizer."""
        return load_tokenizer(str(self.path), self.end_of_text)

    def write(self, number: int, parts: Sequence[Part], tokenizer: Tokenizer, report: Report) -> None:
        """Make one shard."""
        done = 0
        read: list[PartRead] = []

        def tell(part: PartRead) -> None:
            nonlocal done
            read.append(part)
            done += part.part.size

        def progress(tokens: int) -> None:
            nonlocal done
            report(done, tokens)
            done = 0

        write_shard(
            shard_path(self.path, number),
            read_parts(parts, self.text, tell),
            tokenizer,
            parts=read,
            **self.text.fractions,
            order=(self.seed, number),
            block_size=self.block_size,
            progress=progress,
        )
        progress(0)


def tokenise_shards(job: ShardJob, shards: Sequence[Sequence[Part]], missing: Sequence[int], num_workers: int) -> None:
    """Make the shards that are missing, with a progress bar on stderr where that is a terminal.

    Args:
        job: how.
        shards: the parts of every shard.
        missing: the numbers of those to make.
        num_workers: processes; few bytes are tokenised in this one, as all are with 0 or a single shard.

    Raises:
        ValueError: a shard cannot be made, or a worker ended.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    sizes = [sum(part.size for part in parts) for parts in shards]
    to_do = sum(sizes[number] for number in missing)
    tokens_done = 0
    start = time.perf_counter()
    total = sum(sizes)
    with tqdm(total=total, initial=total - to_do, desc="tokenise", unit="B", unit_scale=True, disable=None) as bar:

        def report(size: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            speed = tokens_done / (time.perf_counter() - start)
            bar.set_postfix_str(f"{speed / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(size)

        if num_workers == 0 or len(missing) < 2 or to_do < SMALL:
            tokenizer = job.tokenizer()
            for number in missing:
                job.write(number, shards[number], tokenizer, report)
        else:
            _in_processes(job, [(number, shards[number]) for number in missing], num_workers, report)


def _in_processes(job: ShardJob, tasks: Sequence[Task], num_workers: int, report: Report) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would take over locks that threads hold
    reader, alive = context.Pipe(duplex=False)
    progress = context.SimpleQueue()
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)), context, _begin, (reader, progress, job))
    try:
        pending = {pool.submit(_make_shard, *task) for task in tasks}
        while pending:
            done, pending = wait(pending, timeout=_REFRESH, return_when=FIRST_COMPLETED)
            while not progress.empty():
                report(*progress.get())
            for future in done:
                future.result()
    except BaseException as error:
        alive.close()  # which ends the workers at once
        if isinstance(error, BrokenProcessPool):
            advice = "if memory is short, lower num_workers or shard_size"
            raise SettingError(f"a worker process was killed; {advice}") from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    """What a worker process has for all its shards."""

    job: ShardJob
    tokenizer: Tokenizer
    progress: "SimpleQueue[tuple[int, int]]"


_worker: _Worker | None = None


def _begin(alive: Connection, progress: "SimpleQueue[tuple[int, int]]", job: ShardJob) -> None:
    """Begin a worker process; it ends when nobody holds the other end of `alive`, however the parent went."""
    global _worker  # noqa: PLW0603 (the one of this process)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has its own process
    Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    _worker = _Worker(job, job.tokenizer(), progress)


def _end_with_parent(alive: Connection) -> None:
    with suppress(EOFError, OSError):
        alive.recv()
    os._exit(1)


def _make_shard(number: int, parts: Sequence[Part]) -> None:
    assert _worker is not None, "_begin comes first"
    job, tokenizer, progress = _worker
    job.write(number, parts, tokenizer, lambda size, tokens: progress.put((size, tokens)))
