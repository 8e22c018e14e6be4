"""Sources to a prepared set: planned, tokenised shard by shard, in parallel, and taken up again after a stop.

The plan is written first and the manifest last. In between every shard appears whole or not at all, so whoever comes
after a stop keeps the whole ones. What comes out depends on the plan alone.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import iter_documents, split_of
from nsa_lightning.data.shards import merge_shards, permutation, read_shard, shard_path, token_dtype
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

    def shards(self) -> list[list[Part]]:
        """The parts that make each shard: shuffled by the seed, about `shard_size` bytes of text."""
        size, seed = int(self.settings["shard_size"]), int(self.settings["seed"])
        parts = list(
            itertools.chain.from_iterable(parts_of(file, max(size // PARTS_A_SHARD, 1)) for file in self.files)
        )
        shards: list[list[Part]] = []
        room = 0
        for index in permutation(len(parts), (seed, len(parts))):
            part = parts[index]
            if not shards or part.size > room:
                shards.append([])
                room = size
            shards[-1].append(part)
            room -= part.size
        return shards


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
    _check_same_plan(plan, path)
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
            .jsonl and .parquet; text and jsonl also as .gz and .zst. ~ is expanded, and {stdlib} stands for Python's
            standard library. A protocol may need a package of its own, such as s3fs.
        include: globs of the files to read; left out, all. A relative one, such as *.c, at any depth.
        exclude: globs of files and directories to leave out; the same.
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
    if (path / "plan.json").exists():
        _check_same_plan(plan, path)
    else:
        with whole_file(path / "plan.json") as stream:
            stream.write(json.dumps({"settings": plan.settings, "files": plan.files}, indent=0).encode())
    _remove_leftovers(path)
    shards = plan.shards()
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
    missing = [number for number in range(len(shards)) if read_shard(shard_path(path, number), dtype) is None]
    workers = min(MOST_WORKERS, _num_cores()) if num_workers is None else num_workers
    try:
        tokenise_shards(job, shards, missing, workers)
    except SettingError as error:
        kept = sum(read_shard(shard_path(path, number), dtype) is not None for number in range(len(shards)))
        raise SettingError(f"{error}; {kept} of {len(shards)} shards are whole and kept for the next run") from error
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
            lines.append(f"no document fell to {split}: raise --{name}, {fraction:g} here, or prepare more documents")
    return "\n".join([*lines, f"train on it: nsa fit --data.prepared {store.path}"])


def _check_same_plan(plan: Plan, path: Path) -> None:
    """Refuse to mix what was made by another plan with this one."""
    try:
        state = json.loads((path / "plan.json").read_bytes())
        settings, files = state["settings"], {name: rest for name, *rest in state["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"{path / 'plan.json'} is not the plan of a prepared set: {error!r}; {_another(path)}"
        ) from error
    for name, value in plan.settings.items():
        if settings.get(name) != value:
            raise SettingError(
                f"{path} was prepared with {name}={settings.get(name)!r}, got {value!r}; {_another(path)}"
            )
    now = {name: rest for name, *rest in plan.files}
    changed = [name for name in files.keys() & now.keys() if files[name] != now[name]]
    kinds = {"changed": changed, "gone": files.keys() - now.keys(), "new": now.keys() - files.keys()}
    words = [f"{len(names)} files are {kind}, such as {min(names)}" for kind, names in kinds.items() if names]
    if words:
        raise SettingError(f"{path} was prepared from other files: {'; '.join(words)}; {_another(path)}")


def _another(path: Path) -> str:
    return f"choose another directory, or delete {path}"


def _remove_leftovers(path: Path) -> None:
    """What a process left that was killed as it wrote."""
    for leftover in [*path.glob("*.tmp-*"), *path.glob("shards/*.tmp-*")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


@contextmanager
def _alone_at(path: Path) -> Iterator[None]:
    """Wait until no other process prepares `path`; the lock of one that was killed is free."""
    from filelock import FileLock, Timeout

    lock = FileLock(path / ".lock")
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
