"""A corpus as flat tokens on disk, document after document, read through a memory map.

tokens.bin    uint16 or uint32 [tokens]
offsets.npy   int64 [documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]
splits.npy    uint8 [documents], index into SPLITS
counts.npy    int64 [splits, vocab_size]: how often each token follows another one of its document
manifest.json what the store was made from, and how much it holds
"""

import json
import logging
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from nsa_lightning.data.documents import SPLITS, Document, split_of
from nsa_lightning.data.tokenizer import GROUP, Tokenizer

FORMAT_VERSION = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How much one split holds."""

    documents: int
    tokens: int
    bytes: int  # of UTF-8 text


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store was made from, and how much it holds."""

    format_version: int
    tokenizer: str  # Tokenizer.fingerprint
    vocab_size: int
    dtype: str
    empty_documents: int  # skipped
    splits: dict[str, SplitSize]

    @property
    def num_documents(self) -> int:
        """Documents of all splits."""
        return sum(size.documents for size in self.splits.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all splits."""
        return sum(size.tokens for size in self.splits.values())


class TokenStore:
    """A store on disk; a process that is handed one opens it anew.

    Args:
        path: the store's directory.

    Raises:
        ValueError: the store is of another format, or a file is missing, truncated or broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest = _read_manifest(path / "manifest.json")
            self.tokens = _map_tokens(path / "tokens.bin", self.manifest)
            self.offsets = _map_array(path / "offsets.npy", (self.manifest.num_documents + 1,))
            self._splits = _map_array(path / "splits.npy", (self.manifest.num_documents,))
            self._counts = _map_array(path / "counts.npy", (len(SPLITS), self.manifest.vocab_size))
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; delete the token store {path} and run again") from error

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path]]:
        return TokenStore, (self.path,)

    def documents(self, split: str) -> NDArray[np.int64]:
        """The documents of a split, ascending, int64."""
        return np.flatnonzero(self._splits == SPLITS.index(split))

    def token_counts(self, split: str) -> NDArray[np.int64]:
        """How often each token follows another one of its document, int64 [vocab_size]."""
        return self._counts[SPLITS.index(split)]


def build_token_store(
    path: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    test_fraction: float,
    expected_bytes: int | None = None,
) -> TokenStore:
    """Tokenise `documents` into a new store at `path`, and open it; a store that is there is only opened.

    The store is written beside `path` and renamed when it is whole. Of several processes that build it at once the
    first to finish wins and the others drop their copies.

    Args:
        path: directory of the store.
        documents: read once, a few at a time.
        tokenizer: turns their text into tokens.
        val_fraction: share of documents held out for validation.
        test_fraction: share of documents held out for the test.
        expected_bytes: length of the progress bar, if known.

    Raises:
        ValueError: no document holds text, or the store at `path` is broken.
    """
    if path.exists():
        return TokenStore(path)
    temporary = path.with_name(f"{path.name}.tmp-{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        writer = _Writer(temporary, tokenizer, val_fraction, test_fraction)
        with (temporary / "tokens.bin").open("wb") as stream:
            for batch in _batches(documents, expected_bytes):
                writer.write(batch, stream)
        manifest = writer.finish()
        try:
            temporary.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("tokenised %d documents, %d tokens, into %s", manifest.num_documents, manifest.num_tokens, path)
    return TokenStore(path)


class _Writer:
    """What is known of a store while its documents stream by."""

    def __init__(self, path: Path, tokenizer: Tokenizer, val_fraction: float, test_fraction: float) -> None:
        self.path = path
        self.tokenizer = tokenizer
        self.fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        self.vocab_size = tokenizer.vocab_size
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)
        self.offsets = array("q", [0])
        self.splits = bytearray()
        self.counts = np.zeros((len(SPLITS), self.vocab_size), dtype=np.int64)
        self.bytes = np.zeros(len(SPLITS), dtype=np.int64)
        self.empty = 0

    def write(self, batch: list[Document], stream: BinaryIO) -> None:
        texts = [document.text for document in batch if document.text]
        self.empty += len(batch) - len(texts)
        encoded = self.tokenizer.encode_batch(texts)
        splits = [SPLITS.index(split_of(text, **self.fractions)) for text in texts]
        for text, split, tokens in zip(texts, splits, encoded, strict=True):
            stream.write(tokens.astype(self.dtype).tobytes())
            self.offsets.append(self.offsets[-1] + len(tokens))
            self.bytes[split] += len(text.encode())
        self.splits.extend(splits)
        for split in set(splits):
            followers = [tokens[1:] for tokens, other in zip(encoded, splits, strict=True) if other == split]
            self.counts[split] += np.bincount(np.concatenate(followers), minlength=self.vocab_size)

    def finish(self) -> Manifest:
        if not self.splits:
            raise ValueError(f"data.sources must hold text, got {self.empty} empty documents and no other")
        offsets = np.frombuffer(self.offsets, dtype=np.int64)
        splits = np.frombuffer(self.splits, dtype=np.uint8)
        documents = np.bincount(splits, minlength=len(SPLITS))
        tokens = np.bincount(splits, weights=np.diff(offsets), minlength=len(SPLITS))
        sizes = zip(SPLITS, documents, tokens, self.bytes, strict=True)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            tokenizer=self.tokenizer.fingerprint,
            vocab_size=self.vocab_size,
            dtype=self.dtype.name,
            empty_documents=self.empty,
            splits={name: SplitSize(documents=int(d), tokens=int(t), bytes=int(b)) for name, d, t, b in sizes},
        )
        np.save(self.path / "offsets.npy", offsets)
        np.save(self.path / "splits.npy", splits)
        np.save(self.path / "counts.npy", self.counts)
        (self.path / "manifest.json").write_text(json.dumps(asdict(manifest), indent=2), encoding="utf-8")
        return manifest


def _batches(documents: Iterable[Document], expected_bytes: int | None) -> Iterator[list[Document]]:
    """Documents of about `GROUP` characters at a time, with a progress bar on stderr where that is a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    batch: list[Document] = []
    size = 0
    with tqdm(total=expected_bytes, desc="tokenise", unit="B", unit_scale=True, disable=None) as bar:
        for document in documents:
            batch.append(document)
            size += len(document.text)
            if size >= GROUP or len(batch) >= 2**14:
                yield batch
                bar.update(size)
                batch, size = [], 0
        if batch:
            yield batch
            bar.update(size)


def _read_manifest(path: Path) -> Manifest:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = state["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has format version {version}, this release reads {FORMAT_VERSION}")
        splits = {name: SplitSize(**size) for name, size in state.pop("splits").items()}
        return Manifest(splits=splits, **state)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a store's manifest: {error!r}") from error


def _map_tokens(path: Path, manifest: Manifest) -> NDArray[np.unsignedinteger[Any]]:
    expected = manifest.num_tokens * np.dtype(manifest.dtype).itemsize
    size = path.stat().st_size
    if size != expected:
        raise ValueError(f"{path} must have {expected} bytes, it has {size}")
    return np.asarray(np.memmap(path, dtype=manifest.dtype, mode="r"))


def _map_array(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        values = np.load(path, mmap_mode="r")
    except (EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a whole array: {error}") from error
    if values.shape != shape:
        raise ValueError(f"{path} must have shape {shape}, it has {values.shape}")
    return np.asarray(values)
