"""Processes that tokenise shards, one at a time each, and the bar that shows how far they are."""

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import PartRead, read_parts
from nsa_lightning.data.shards import shard_path, write_shard
from nsa_lightning.data.sources import Part
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer

SMALL = 2**22  # bytes of text that are tokenised before a process has started

Task = tuple[int, Sequence[Part]]
"""A shard's number and parts."""

Report = Callable[[int, int], None]
"""Is told bytes of text, as planned, and tokens, as they are done."""


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """How parts become shards of the set at `path`, whose tokenizer.json is there already."""

    path: Path
    text_field: str
    skip_binary: bool
    end_of_text: str
    val_fraction: float
    test_fraction: float
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
            read_parts(parts, self.text_field, skip_binary=self.skip_binary, read=tell),
            tokenizer,
            parts=read,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
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
    waiting = iter(tasks)
    workers: dict[Connection, SpawnProcess] = {}
    try:
        for first in itertools.islice(waiting, num_workers):
            pipe, theirs = context.Pipe()
            workers[pipe] = context.Process(target=_work, args=(theirs, job), daemon=True)
            workers[pipe].start()
            theirs.close()
            _hand(pipe, first)
        busy = set(workers)
        while busy:
            for pipe in busy.intersection(wait(busy)):
                match _receive(pipe, workers[pipe]):
                    case (size, tokens):
                        report(size, tokens)
                    case None:
                        task = next(waiting, None)
                        busy.remove(pipe) if task is None else _hand(pipe, task)
                    case failure:
                        raise SettingError(failure)
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _hand(pipe: Connection, task: Task) -> None:
    with suppress(BrokenPipeError):  # of a worker that ended: `_receive` says so
        pipe.send(task)


def _receive(pipe: Connection, worker: SpawnProcess) -> tuple[int, int] | str | None:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        worker.join()
        advice = "if memory is short, lower num_workers or shard_size"
        raise SettingError(f"a worker process ended with status {worker.exitcode}; {advice}") from error


def _work(pipe: Connection, job: ShardJob) -> None:
    """Make the shards that come through the pipe. Sent back are progress, None after each and the text of an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has its own process

    def tell(message: tuple[int, int] | str | None) -> None:
        try:
            pipe.send(message)
        except OSError:  # the parent is gone
            sys.exit()

    try:
        tokenizer = job.tokenizer()
        while True:
            number, parts = pipe.recv()
            job.write(number, parts, tokenizer, lambda size, tokens: tell((size, tokens)))
            tell(None)
    except EOFError:  # the parent is gone
        return
    except SettingError as error:
        tell(str(error))
