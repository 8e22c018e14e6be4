"""Sources to a prepared set: planned, tokenised shard by shard, in parallel, and taken up again after a stop.

The plan is written first and the manifest last. In between every shard appears whole or not at all, so whoever comes
after a stop keeps the whole ones. What comes out depends on the plan alone, but where files change after a stop, a bad
one that is mended for example: then the shards that were whole by then, and still fit, stay as they are.
"""

import hashlib
import itertools
import json
import logging
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import PartRead, holds_still, iter_documents, split_of
from nsa_lightning.data.shards import (
    merge_shards,
    parts_of_shard,
    permutation,
    read_shard,
    shard_path,
    token_dtype,
)
from nsa_lightning.data.sources import Part, SourceFile, find_files, parts_of
from nsa_lightning.data.storage import is_url, whole_file, writable
from nsa_lightning.data.token_store import FORMAT_VERSION, TokenStore
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer, training_sample
from nsa_lightning.data.workers import ShardJob, tokenise_shards
from nsa_lightning.paths import expand_path

SHARD_SIZE = 2**27
PARTS_A_SHARD = 8  # that a long file is cut in: each shard mixes parts of several places
TRAINING_TEXT = 2**28  # characters, of which a trained tokenizer sees a sample
MOST_WORKERS = 8

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a prepared set depends on."""

    settings: dict[str, str | int | float]  # by name
    files: list[SourceFile]
    tokenizer: Tokenizer | None  # None: one is trained
    vocab_size: int  # of that one

    @property
    def fingerprint(self) -> str:
        """Changes with any setting, and with the name, size or time of modification of any file."""
        return hashlib.blake2b(json.dumps([self.settings, self.files]).encode(), digest_size=12).hexdigest()

    def parts(self) -> list[Part]:
        """What is read of all files at a time."""
        size = max(int(self.settings["shard_size"]) // PARTS_A_SHARD, 1)
        return list(itertools.chain.from_iterable(parts_of(file, size) for file in self.files))

    def shards(self, kept: Sequence[list[Part]] = ()) -> list[list[Part]]:
        """The parts that make each shard: those of `kept`, and the others shuffled by the seed.

        A shard has about `shard_size` bytes of text.
        """
        size, seed = int(self.settings["shard_size"]), int(self.settings["seed"])
        taken = set(itertools.chain.from_iterable(kept))
        parts = [part for part in self.parts() if part not in taken]
        shards: list[list[Part]] = []
        room = 0
        for index in permutation(len(parts), (seed, len(parts))):
            part = parts[index]
            if not shards or part.size > room:
                shards.append([])
                room = size
            shards[-1].append(part)
            room -= part.size
        return [*kept, *shards]


def make_plan(
    sources: Sequence[str],
    tokenizer: TokenizerConfig,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    text_field: str = "text",
    skip_binary: bool = False,
    val_fraction: float = 0.01,
    test_fraction: float = 0.01,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Look what there is to prepare. Nothing is read but names, sizes and times of modification.

    Args:
        sources: paths and URLs of files, directories and globs, as in `find_files`.
        tokenizer: which tokenizer, or how large a one is to be trained.
        include: globs of what to keep.
        exclude: globs of what to leave out.
        text_field: the field of a jsonl line, or the column of a parquet file, that holds the text.
        skip_binary: take a file that is no UTF-8 text for an empty document, and go on.
        val_fraction: share of documents held out for validation, by a hash of their text.
        test_fraction: share of documents held out for the test, by the same hash.
        seed: shuffles the documents.
        shard_size: bytes of text that are tokenised, shuffled and held in memory at a time.

    Raises:
        ValueError: a setting is out of its range, a source matches no file, or the tokenizer cannot be opened.
    """
    for name, least, value in (("seed", 0, seed), ("shard_size", 1, shard_size)):
        if value < least:
            raise SettingError(f"data.{name} must be at least {least}, got {value}")
    check_fractions(val_fraction, test_fraction)
    opened = load_tokenizer(tokenizer.path, tokenizer.end_of_text) if tokenizer.path is not None else None
    settings: dict[str, str | int | float] = {
        "format_version": FORMAT_VERSION,
        "text_field": text_field,
        "skip_binary": skip_binary,
        "tokenizer": f"trained, vocab_size {tokenizer.vocab_size}" if opened is None else opened.fingerprint,
        "val_fraction": val_fraction,
        "test_fraction": test_fraction,
        "seed": seed,
        "shard_size": shard_size,
    }
    files = find_files(sources, include, exclude)
    return Plan(settings=settings, files=files, tokenizer=opened, vocab_size=tokenizer.vocab_size)


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
    if words := _changes(plan, _read_plan(plan, path), path):
        raise SettingError(words)
    return TokenStore(path)


def prepare_set(
    *,
    output_dir: str,
    sources: list[str] = [],  # noqa: B006 - read only; jsonargparse shows it
    include: list[str] = [],  # noqa: B006
    exclude: list[str] = [],  # noqa: B006
    text_field: str = "text",
    skip_binary: bool = False,
    tokenizer: TokenizerConfig = TokenizerConfig(),  # noqa: B008  (frozen)
    val_fraction: float = 0.01,
    test_fraction: float = 0.01,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    num_workers: int | None = None,
    verify: bool = False,
) -> int:
    """Tokenise sources into a prepared set, for `--data.prepared DIR` of nsa fit.

    Run again after a stop, the same command goes on: shards that are whole are kept. The set is the same for any number
    of workers and stops. Its directory can be copied anywhere, object storage included, and is read there by its URL.

    Args:
        output_dir: directory of the set. With verify also a URL.
        sources: files, directories, globs (** for any depth) and fsspec URLs (s3://..., https://...) of text, code,
            .json(l) and .parquet; all but parquet also as .gz and .zst. ~ is expanded, and {stdlib} stands for
            Python's standard library. A protocol may need a package of its own, such as s3fs.
        include: globs of the files to read; left out, all. A relative one, such as *.c, at any depth.
        exclude: globs of files and directories to leave out; the same. One that matches nothing is told.
        text_field: the field of a jsonl line, or the column of a parquet file, that holds the text.
        skip_binary: take a file that is no UTF-8 text for an empty document, and go on.
        tokenizer: how text becomes tokens.
        val_fraction: share of documents held out for validation, by a hash of their text.
        test_fraction: share of documents held out for the test, by the same hash.
        seed: shuffles the documents.
        shard_size: bytes of text in a shard. What a worker holds in memory grows with it and with the longest document.
        num_workers: processes, one shard each at a time; 0 works in this one. Left out: one a core, at most 8.
        verify: prepare nothing, compare every file of the set with its checksum.

    Returns:
        The exit status, 0.

    Raises:
        ValueError: a setting is out of its range, or a file cannot be read or written.
    """
    output_dir = expand_path(output_dir)
    if verify:
        with TemporaryDirectory() as cache_dir:
            TokenStore(output_dir, Path(cache_dir)).verify()
        print(f"{output_dir}: every file is as it was written")
        return 0
    if not sources:
        raise SettingError("sources must name files, directories, globs or URLs, got none")
    if is_url(output_dir):
        raise SettingError(
            f"output_dir must be a local directory, got {output_dir}: copy the set there when it is whole"
        )
    plan = make_plan(
        sources,
        tokenizer,
        include=include,
        exclude=exclude,
        text_field=text_field,
        skip_binary=skip_binary,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        shard_size=shard_size,
    )
    store = prepare(plan, Path(output_dir), num_workers)
    print(_summary(store, plan))
    return 0


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuse shares that leave nothing to train on.

    Raises:
        ValueError: one is negative, or their sum is 1 or more.
    """
    fractions = val_fraction, test_fraction
    if min(fractions) < 0 or sum(fractions) >= 1:
        raise SettingError(
            f"data.val_fraction and data.test_fraction must be 0 or more, below 1 in sum, got {fractions}"
        )


def _prepare(plan: Plan, path: Path, num_workers: int | None) -> None:
    if (path / "manifest.json").exists():  # by now
        return
    _remove_leftovers(path)
    if (path / "plan.json").exists():
        kept = _take_up(plan, path)
    else:
        kept = []
        _write_plan(plan, path, kept)
    shards = plan.shards(kept)
    tokenizer = _open_tokenizer(plan, path, shards)
    fractions = _fractions(plan)
    job = ShardJob(
        path=path,
        text_field=str(plan.settings["text_field"]),
        skip_binary=bool(plan.settings["skip_binary"]),
        end_of_text=tokenizer.end_of_text,
        seed=int(plan.settings["seed"]),
        block_size=int(plan.settings["shard_size"]),
        **fractions,
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
    merge_shards(path, len(shards), tokenizer, **fractions)


def _open_tokenizer(plan: Plan, path: Path, shards: list[list[Part]]) -> Tokenizer:
    """The plan's tokenizer, kept in the set; one that is to be trained sees the training texts of the first shards."""
    kept = path / "tokenizer.json"
    if plan.tokenizer is not None:
        tokenizer = plan.tokenizer
    elif kept.exists():
        return load_tokenizer(str(kept))
    else:
        texts = _training_texts(plan, shards)
        tokenizer = train_tokenizer(training_sample(texts), plan.vocab_size)
    tokenizer.save(kept)
    return tokenizer


def _training_texts(plan: Plan, shards: list[list[Part]]) -> Iterator[str]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    parts = list(itertools.chain.from_iterable(shards))
    read, total = 0, min(TRAINING_TEXT, sum(part.size for part in parts))
    field, skip_binary = str(plan.settings["text_field"]), bool(plan.settings["skip_binary"])
    with tqdm(total=total, desc="read for the tokenizer", unit="B", unit_scale=True, disable=None) as bar:
        for document in iter_documents(parts, field, skip_binary=skip_binary):
            if split_of(document.text, **_fractions(plan)) == "train":
                yield document.text
            bar.update(len(document.text))
            read += len(document.text)
            if read >= TRAINING_TEXT:
                return


def _fractions(plan: Plan) -> dict[str, float]:
    return {name: float(plan.settings[name]) for name in ("val_fraction", "test_fraction")}


def _summary(store: TokenStore, plan: Plan) -> str:
    manifest = store.manifest
    lines = [f"{'split':<7}{'documents':>14}{'tokens':>18}{'bytes of text':>18}"]
    for name, size in manifest.splits.items():
        lines.append(f"{name:<7}{size.documents:>14,}{size.tokens:>18,}{size.bytes:>18,}")
    lines.append(f"tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size:,}")
    lines.append(
        f"data {manifest.fingerprint}, {len(manifest.shards)} shards, {manifest.empty_documents:,} empty documents"
    )
    for name, fraction in _fractions(plan).items():
        split = name.removesuffix("_fraction")
        if fraction and not manifest.splits[split].documents:
            lines.append(
                f"no document fell to {split}: raise --{name}, {fraction:g} here, set it to 0 or prepare more documents"
            )
    if not manifest.splits["train"].documents:
        lines.append("no document fell to train: lower --val_fraction and --test_fraction, or prepare more documents")
    elif manifest.splits["val"].documents or not manifest.val_fraction:  # else nsa fit refuses the set
        lines.append(f"train on it: nsa fit {_settings_of_a_fit()} --data.prepared {shlex.quote(str(store.path))}")
    return "\n".join(lines)


def _settings_of_a_fit() -> str:
    """A config of ours that is there, or the least that `nsa fit` needs."""
    ours = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    if not ours.is_file():  # they do not come with an installed package
        return "--trainer.max_steps 1000"
    below = ours.is_relative_to(Path.cwd())
    return f"--config {shlex.quote(str(ours.relative_to(Path.cwd()) if below else ours))}"


class _OldPlan(NamedTuple):
    """What an earlier call wrote of its plan."""

    files: dict[str, list[Any]]  # size and version, by name
    kept: list[list[Part]]  # the parts of the first shards, where they were made for other files


def _write_plan(plan: Plan, path: Path, kept: list[list[Part]]) -> None:
    with whole_file(path / "plan.json") as stream:
        state = {"settings": plan.settings, "files": plan.files, "kept": kept}
        stream.write(json.dumps(state, indent=0).encode())


def _read_plan(plan: Plan, path: Path) -> _OldPlan:
    """The plan of the set at `path`; one with other settings is refused."""
    try:
        state = json.loads((path / "plan.json").read_bytes())
        settings, files = state["settings"], {name: rest for name, *rest in state["files"]}
        old = _OldPlan(files, [[Part(*part) for part in parts] for parts in state.get("kept", [])])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path / 'plan.json'} is not the plan of a prepared set: {error!r}; {_another(path)}"
        ) from error
    for name, value in plan.settings.items():
        if settings.get(name) != value:
            raise SettingError(
                f"{path} was prepared with {name}={settings.get(name)!r}, got {value!r}; {_another(path)}"
            )
    return old


def _changes(plan: Plan, old: _OldPlan, path: Path) -> str:
    """How the files differ from those of the old plan; nothing if they do not."""
    now = {name: rest for name, *rest in plan.files}
    changed = [name for name in old.files.keys() & now.keys() if old.files[name] != now[name]]
    kinds = {"changed": changed, "gone": old.files.keys() - now.keys(), "new": now.keys() - old.files.keys()}
    words = [f"{len(names)} files are {kind}, such as {min(names)}" for kind, names in kinds.items() if names]
    return f"{path} was prepared from other files: {'; '.join(words)}; {_another(path)}" if words else ""


def _take_up(plan: Plan, path: Path) -> list[list[Part]]:
    """The shards of an unfinished set that are kept because its files have changed since; nothing if they have not.

    A shard is kept where its parts are parts of the plan too, and those of changed files hold the same documents. It
    takes a low number, and what is left is laid in shards anew.
    """
    old = _read_plan(plan, path)
    words = _changes(plan, old, path)
    if not words:
        return old.kept
    planned, now = set(plan.parts()), {name: rest for name, *rest in plan.files}
    field, skip_binary = str(plan.settings["text_field"]), bool(plan.settings["skip_binary"])

    def fits(found: PartRead) -> bool:
        name = found.part.name
        same_file = old.files.get(name) == now.get(name)
        return found.part in planned and (same_file or holds_still(found, field, skip_binary=skip_binary))

    folders = [folder for folder in path.glob("shards/*") if folder.name.isdecimal()]
    folders.sort(key=lambda folder: int(folder.name))
    made = {folder: parts for folder in folders if (parts := parts_of_shard(folder))}
    fitting = {folder: parts for folder, parts in made.items() if all(map(fits, parts))}
    if made and not fitting:
        raise SettingError(words)
    log.warning("%s: its files have changed, %d of %d shards are used again", path, len(fitting), len(made))
    kept = [[each.part for each in parts] for parts in fitting.values()]
    _write_plan(plan, path, kept)
    with writable(path):
        for folder in folders:
            if folder not in fitting:
                shutil.rmtree(folder)
        for number, folder in enumerate(fitting):
            folder.rename(shard_path(path, number))
        if not kept:  # a tokenizer that was trained has seen the files of the old plan
            (path / "tokenizer.json").unlink(missing_ok=True)
    return kept


def _is_whole(folder: Path, dtype: str, parts: Sequence[Part]) -> bool:
    """Whether `folder` is a whole shard of these parts."""
    return read_shard(folder, dtype) is not None and [each.part for each in parts_of_shard(folder)] == list(parts)


def _another(path: Path) -> str:
    return f"choose another directory, or delete {path}"


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
