"""Documents to the shards of a prepared set, and whole shards to the set.

Beside its tokens a shard keeps what the set is merged from:

lengths.npy   int64 [documents], those of train first, then val, then test
counts.npy    int64 [splits, vocab_size]: how often each token follows another one of its document
shard.json    how much the shard holds, and the checksums of its tokens
parts.json    the parts of files that it was made of, each with a digest of its texts
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray

from nsa_lightning.data.documents import Document, PartRead
from nsa_lightning.data.sources import Part
from nsa_lightning.data.splits import SPLITS, split_of
from nsa_lightning.data.storage import save_array, whole_directory, whole_file
from nsa_lightning.data.token_store import (
    BYTE_COUNT,
    FORMAT_VERSION,
    Manifest,
    SplitSize,
    TokenStore,
    checksum,
    count_file,
    write_manifest,
)
from nsa_lightning.data.tokenizer import GROUP, Tokenizer

COUNTED = ("val", "test")
"""Splits that are scored in bits per byte: where the tokenizer is not byte-level, the bytes of each token are kept."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """How much a shard holds."""

    empty_documents: int  # skipped
    splits: dict[str, SplitSize]  # those that have documents
    checksums: dict[str, str]  # of their tokens, and of the byte counts
    first_bytes: dict[str, int]  # of documents' first tokens, by the splits that have byte counts


def write_shard(
    path: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    test_fraction: float,
    parts: Sequence[PartRead] = (),
    order: tuple[int, int] | None = None,
    block_size: int = 2**27,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Tokenise documents into a shard that appears at `path` once it is whole.

    Args:
        path: directory of the shard.
        documents: read once, a few at a time.
        tokenizer: turns their text into tokens.
        val_fraction: share of documents held out for validation, by a hash of their text.
        test_fraction: share of documents held out for the test, by the same hash.
        parts: what the documents come from; looked at once all of them have been read.
        order: what to shuffle the documents by, such as (seed, shard); None keeps their order.
        block_size: bytes of text that are shuffled, and held in memory, at a time.
        progress: told the tokens of each few documents.

    Raises:
        ValueError: a file cannot be written.
    """
    with whole_directory(path) as directory, ExitStack() as files:
        writer = _ShardWriter(directory, files, tokenizer, order)
        for batch in _batches(documents):
            texts = [document.text for document in batch if document.text]
            writer.empty += len(batch) - len(texts)
            splits = [SPLITS.index(split_of(text, val_fraction, test_fraction)) for text in texts]
            progress(writer.add(texts, splits))
            if writer.held_bytes >= block_size:
                writer.flush()
        writer.flush()
        files.close()
        writer.finish()
        (directory / "parts.json").write_text(json.dumps(parts), encoding="utf-8")


def read_shard(path: Path, dtype: str) -> Shard | None:
    """What `write_shard` left at `path`, or None if that is not whole."""
    try:
        state: dict[str, Any] = json.loads((path / "shard.json").read_bytes())
        splits = {name: SplitSize(**size) for name, size in state.pop("splits").items()}
        itemsize = np.dtype(dtype).itemsize
        shard = Shard(splits=splits, **state)
        files = {f"{name}.bin": size.tokens * itemsize for name, size in splits.items()}
        files |= {count_file(f"{name}.bin"): splits[name].tokens * BYTE_COUNT.itemsize for name in shard.first_bytes}
        return shard if all((path / name).stat().st_size == size for name, size in files.items()) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parts_of_shard(path: Path) -> list[PartRead]:
    """What the shard at `path` was made of; nothing if that is not known."""
    try:
        return [PartRead(Part(*part), digest) for part, digest in json.loads((path / "parts.json").read_bytes())]
    except (OSError, ValueError, TypeError):
        return []


def merge_shards(
    path: Path, num_shards: int, tokenizer: Tokenizer, *, val_fraction: float, test_fraction: float
) -> TokenStore:
    """Make a set of the whole shards below `path`.

    Raises:
        ValueError: no document holds text, or a file cannot be written.
    """
    dtype = token_dtype(tokenizer).name
    folders = [shard_path(path, number) for number in range(num_shards)]
    shards = [shard for shard in (read_shard(folder, dtype) for folder in folders) if shard is not None]
    assert len(shards) == num_shards, "every shard must be whole"
    empty = sum(shard.empty_documents for shard in shards)
    splits = {name: _total([shard.splits[name] for shard in shards if name in shard.splits]) for name in SPLITS}
    if not any(size.documents for size in splits.values()):
        raise SettingError(f"data.sources must hold text, got {empty} empty documents and no other")
    counts = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
    for folder in folders:
        counts += np.load(folder / "counts.npy")
    with whole_file(path / "counts.npy") as stream:
        save_array(stream, counts)
    for name in SPLITS:
        with whole_file(path / f"{name}.offsets.npy") as stream:
            _write_offsets(stream, name, splits[name].documents, zip(folders, shards, strict=True))
    tokenizer.save(path / "tokenizer.json")
    names = ["tokenizer.json", "counts.npy", *(f"{name}.offsets.npy" for name in SPLITS)]
    checksums = {name: checksum(path / name) for name in names}
    for folder, shard in zip(folders, shards, strict=True):
        checksums |= {f"shards/{folder.name}/{name}": value for name, value in shard.checksums.items()}
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        tokenizer=tokenizer.fingerprint,
        end_of_text=tokenizer.end_of_text,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        empty_documents=empty,
        splits=splits,
        shards=[{name: size.tokens for name, size in shard.splits.items()} for shard in shards],
        checksums=checksums,
        first_bytes=None
        if tokenizer.is_byte_level
        else {name: sum(shard.first_bytes.get(name, 0) for shard in shards) for name in COUNTED},
    )
    write_manifest(path, manifest)
    return TokenStore(path)


def shard_path(path: Path, number: int) -> Path:
    """The directory of a shard in the set at `path`."""
    return path / "shards" / f"{number:05}"


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest type that holds every token."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def permutation(size: int, key: tuple[int, int], block: int = 0) -> NDArray[np.int64]:
    """Sort by the raw stream of a counter-based generator: no library version may change the order."""
    counter = np.array([0, 0, 0, block], dtype=np.uint64)
    keys = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter).random_raw(size)
    return np.argsort(keys, kind="stable")


class _ShardWriter:
    """What is known of a shard while its documents stream by; the documents of a block wait to be shuffled."""

    def __init__(self, path: Path, files: ExitStack, tokenizer: Tokenizer, order: tuple[int, int] | None) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.order = order
        self.empty = 0
        self.held_bytes = 0
        self._files = files
        self._streams: dict[str, BinaryIO] = {}
        self._dtype = token_dtype(tokenizer)
        self._counted = [not tokenizer.is_byte_level and name in COUNTED for name in SPLITS]
        self._held: list[tuple[int, NDArray[Any], NDArray[Any] | None]] = []
        self._blocks = 0
        self._lengths: list[list[NDArray[np.int64]]] = [[] for _ in SPLITS]
        self._counts = np.zeros((len(SPLITS), tokenizer.vocab_size), dtype=np.int64)
        self._bytes = [0] * len(SPLITS)
        self._first_bytes = [0] * len(SPLITS)

    def add(self, texts: list[str], splits: list[int]) -> int:
        """Tokenise some documents; returns their tokens."""
        encoded, counts = self._encode(texts, splits)
        for text, split, tokens, own in zip(texts, splits, encoded, counts, strict=True):
            size = len(text.encode())
            self._bytes[split] += size
            self.held_bytes += size
            self._held.append((split, tokens.astype(self._dtype), None if own is None else own.astype(BYTE_COUNT)))
            if own is not None:
                self._first_bytes[split] += int(own[0])
        for split in set(splits):
            followers = [tokens[1:] for tokens, other in zip(encoded, splits, strict=True) if other == split]
            self._counts[split] += np.bincount(np.concatenate(followers), minlength=len(self._counts[split]))
        return sum(map(len, encoded))

    def _encode(
        self, texts: list[str], splits: list[int]
    ) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64] | None]]:
        """The tokens of all texts, and the byte counts of those whose split keeps them."""
        if not any(self._counted):
            return self.tokenizer.encode_batch(texts), [None] * len(texts)
        counted = iter(self.tokenizer.encode_counted(self._of(texts, splits, True)))
        plain = iter(self.tokenizer.encode_batch(self._of(texts, splits, False)))
        both = [next(counted) if self._counted[split] else (next(plain), None) for split in splits]
        return [tokens for tokens, _ in both], [counts for _, counts in both]

    def _of(self, texts: list[str], splits: list[int], counted: bool) -> list[str]:
        return [text for text, split in zip(texts, splits, strict=True) if self._counted[split] == counted]

    def flush(self) -> None:
        """Write the block that is held."""
        shuffled = [self._held[index] for index in self._shuffled()]
        for split, tokens, counts in shuffled:
            self._write(f"{SPLITS[split]}.bin", tokens)
            if counts is not None:
                self._write(count_file(f"{SPLITS[split]}.bin"), counts)
        for split, lengths in enumerate(self._lengths):
            lengths.append(np.array([len(tokens) for other, tokens, _ in shuffled if other == split], dtype=np.int64))
        self._held, self.held_bytes, self._blocks = [], 0, self._blocks + 1

    def _write(self, name: str, values: NDArray[Any]) -> None:
        if name not in self._streams:
            self._streams[name] = self._files.enter_context((self.path / name).open("wb", buffering=2**20))
        self._streams[name].write(values.tobytes())

    def _shuffled(self) -> NDArray[np.int64]:
        count = len(self._held)
        return np.arange(count) if self.order is None else permutation(count, self.order, self._blocks)

    def finish(self) -> None:
        """Write what the shard holds, once its token files are closed."""
        lengths = [np.concatenate(blocks) for blocks in self._lengths]
        sizes = zip(SPLITS, lengths, self._bytes, strict=True)
        splits = {
            name: SplitSize(documents=len(own), tokens=int(own.sum()), bytes=size) for name, own, size in sizes if size
        }
        checksums = {name: checksum(self.path / name) for name in sorted(self._streams)}
        first_bytes = {
            name: size
            for name, size, counted in zip(SPLITS, self._first_bytes, self._counted, strict=True)
            if counted and name in splits
        }
        for name, values in ("lengths.npy", np.concatenate(lengths)), ("counts.npy", self._counts):
            with (self.path / name).open("wb") as stream:
                save_array(stream, values)
        shard = Shard(empty_documents=self.empty, splits=splits, checksums=checksums, first_bytes=first_bytes)
        (self.path / "shard.json").write_text(json.dumps(asdict(shard), indent=1), encoding="utf-8")


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents of about `GROUP` characters at a time."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= GROUP or len(batch) >= 2**14:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _total(sizes: list[SplitSize]) -> SplitSize:
    return SplitSize(
        documents=sum(size.documents for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        bytes=sum(size.bytes for size in sizes),
    )


def _write_offsets(stream: BinaryIO, split: str, documents: int, shards: Iterable[tuple[Path, Shard]]) -> None:
    """The ends of all documents of a split, one shard in memory at a time."""
    header = {"descr": "<i8", "fortran_order": False, "shape": (documents + 1,)}
    np.lib.format.write_array_header_1_0(stream, header)
    end = np.zeros(1, dtype=np.int64)
    stream.write(end.tobytes())
    for folder, shard in shards:
        sizes = [shard.splits[name].documents if name in shard.splits else 0 for name in SPLITS]
        start = sum(sizes[: SPLITS.index(split)])
        lengths = np.load(folder / "lengths.npy", mmap_mode="r")[start : start + sizes[SPLITS.index(split)]]
        ends = end[-1] + np.cumsum(lengths)
        stream.write(ends.tobytes())
        end = np.append(end, ends)[-1:]
