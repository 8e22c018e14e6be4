"""A prepared set: a corpus as flat tokens in shards, document after document, in a directory or behind a URL.

manifest.json             what the set was made from, how much it holds and the checksum of every file; written last
tokenizer.json            what made the tokens
{split}.offsets.npy       int64 [documents + 1]: document i is tokens offsets[i] to offsets[i + 1] of its split
counts.npy                int64 [splits, vocab_size]: how often each token follows another one of its document
shards/00000/{split}.bin  uint16 or uint32 [tokens]; a split's tokens lie end to end over all shards
shards/00000/{split}.bytes  uint32 [tokens] of val and test: bytes of text that each token stands for; only where that
                          does not follow from the token, as it does for a byte-level tokenizer
"""

import hashlib
import io
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray

from nsa_lightning.data.splits import SPLITS
from nsa_lightning.data.storage import filesystem_of, is_url, open_binary, retried, whole_file, writable
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer

FORMAT_VERSION = 3
OLDEST_FORMAT_VERSION = 2  # that is read: it has no byte counts
BYTE_COUNT = np.dtype(np.uint32)
MAX_OPEN = 64  # token files that a split keeps open

# P pieces of documents, each by its first token in the split and its length.


@dataclass(frozen=True, kw_only=True)
class SplitSize:
    """How much one split holds."""

    documents: int
    tokens: int
    bytes: int  # of UTF-8 text


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a set was made from, and how much it holds."""

    format_version: int
    tokenizer: str  # Tokenizer.fingerprint
    end_of_text: str
    vocab_size: int
    dtype: str
    val_fraction: float
    test_fraction: float
    empty_documents: int  # skipped
    splits: dict[str, SplitSize]
    shards: list[dict[str, int]]  # tokens of each split that has some, by shard
    checksums: dict[str, str]  # of every file that a reader opens, by its path in the set
    first_bytes: dict[str, int] | None = None  # of documents' first tokens in val and test; None: no byte counts

    @property
    def num_documents(self) -> int:
        """Documents of all splits."""
        return sum(size.documents for size in self.splits.values())

    @property
    def num_tokens(self) -> int:
        """Tokens of all splits."""
        return sum(size.tokens for size in self.splits.values())

    @cached_property
    def fingerprint(self) -> str:
        """The identity of the data: changes with any token and any document's bounds, not with where the set lies."""
        data = {name: value for name, value in self.checksums.items() if name.endswith((".bin", ".offsets.npy"))}
        return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=16).hexdigest()


class TokenStore:
    """A prepared set; a process that is handed one opens it anew.

    Args:
        path: its directory, or its URL.
        cache_dir: where the offsets of a URL are kept, for they are read through a memory map; unused otherwise.

    Raises:
        ValueError: the set is of another format, or a file is missing, truncated or broken.
    """

    def __init__(self, path: Path | str, cache_dir: Path | None = None) -> None:
        self.path = path if is_url(path) else Path(path)
        self.cache_dir = cache_dir
        self._splits: dict[str, TokenSplit] = {}
        if isinstance(self.path, Path) and not (self.path / "manifest.json").exists():
            raise SettingError(
                f"{path} is not a whole prepared set, it has no manifest.json: nsa prepare writes that last"
            )
        try:
            self.manifest = _read_manifest(self.place("manifest.json"))
            if not is_url(self.path):
                self._check_sizes()
        except (OSError, ValueError) as error:
            raise SettingError(f"{error}; {self._remedy}") from error

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[Path | str, Path | None]]:
        return TokenStore, (self.path, self.cache_dir)

    @property
    def fingerprint(self) -> str:
        """The identity of the data, `Manifest.fingerprint`."""
        return self.manifest.fingerprint

    def split(self, name: str) -> "TokenSplit":
        """The documents of one split."""
        if name not in self._splits:
            self._splits[name] = TokenSplit(self, name)
        return self._splits[name]

    def token_counts(self, split: str) -> NDArray[np.int64]:
        """How often each token follows another one of its document, int64 [vocab_size]."""
        return self._counts[SPLITS.index(split)]

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            ValueError: the set's tokenizer.json is another one.
        """
        tokenizer = load_tokenizer(str(self._local("tokenizer.json")), self.manifest.end_of_text)
        if tokenizer.fingerprint != self.manifest.tokenizer:
            raise SettingError(
                f"{self.place('tokenizer.json')} is tokenizer {tokenizer.fingerprint}, "
                f"the tokens were made by {self.manifest.tokenizer}; {self._remedy}"
            )
        return tokenizer

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            ValueError: a file is missing or differs; all such files are named.
        """
        from tqdm import tqdm  # type: ignore[import-untyped]

        broken = []
        for name, expected in tqdm(self.manifest.checksums.items(), desc="verify", unit="file", disable=None):
            try:
                found = checksum(self.place(name))
            except (OSError, ValueError) as error:
                broken.append(str(error))
            else:
                if found != expected:
                    broken.append(f"{self.place(name)} must have checksum {expected}, it has {found}")
        if broken:
            raise SettingError(f"{'; '.join(broken)}; {self._remedy}")

    def place(self, name: str) -> Path | str:
        """The path or URL of one of the set's files."""
        return f"{str(self.path).rstrip('/')}/{name}" if is_url(self.path) else Path(self.path, name)

    def map_array(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """One of the set's arrays, through a memory map."""
        try:
            return _map_array(self._local(name), shape)
        except (OSError, ValueError) as error:
            raise SettingError(f"{error}; {self._remedy}") from error

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        return self.map_array("counts.npy", (len(SPLITS), self.manifest.vocab_size))

    @property
    def _remedy(self) -> str:
        if is_url(self.path):
            return f"if the URL is right, copy the prepared set to {self.path} again"
        return f"delete {Path(self.path, 'manifest.json')} and what is damaged, and prepare again: the rest is kept"

    def _local(self, name: str) -> Path:
        """A file of the set, or the cache's copy of one that lies behind a URL."""
        place = self.place(name)
        if isinstance(place, Path):
            return place
        if self.cache_dir is None:
            raise SettingError(
                f"a prepared set behind a URL needs data.cache_dir for its offsets, got none for {place}"
            )
        copy = self.cache_dir / f"remote-{self.fingerprint}" / name
        if not copy.exists():
            with writable(copy.parent):
                copy.parent.mkdir(parents=True, exist_ok=True)
            with open_binary(place) as source, whole_file(copy) as stream:
                digest = hashlib.blake2b(digest_size=16)
                while block := source.read(2**22):
                    digest.update(block)
                    stream.write(block)
                if digest.hexdigest() != self.manifest.checksums[name]:
                    raise SettingError(f"{place} differs from its checksum; {self._remedy}")
        return copy

    def _check_sizes(self) -> None:
        itemsize = np.dtype(self.manifest.dtype).itemsize
        files = [(name, tokens * itemsize) for split in SPLITS for name, tokens in token_files(self.manifest, split)]
        for split in self.manifest.first_bytes or {}:
            files += [
                (count_file(name), tokens * BYTE_COUNT.itemsize) for name, tokens in token_files(self.manifest, split)
            ]
        for name, expected in files:
            size = Path(self.path, name).stat().st_size
            if size != expected:
                raise SettingError(f"{self.place(name)} must have {expected} bytes, it has {size}")


class TokenSplit:
    """The documents of one split, end to end. Tokens are named by their place in the split, 0 to `num_tokens`.

    Files are read and not mapped, so that a process grows by what it reads at a time and not by what it has read.
    """

    def __init__(self, store: TokenStore, name: str) -> None:
        self.store = store
        self.name = name
        size = store.manifest.splits[name]
        self.num_documents, self.num_tokens = size.documents, size.tokens
        self.offsets: NDArray[np.int64] = store.map_array(f"{name}.offsets.npy", (self.num_documents + 1,))
        files = list(token_files(store.manifest, name))
        self._names = [file for file, _ in files]
        self._bounds = [0, *accumulate(tokens for _, tokens in files)]
        self._dtype = np.dtype(store.manifest.dtype)
        self._open: dict[str, io.FileIO] = {}
        self.has_byte_counts = name in (store.manifest.first_bytes or {})

    def __reduce__(self) -> tuple[Any, tuple[TokenStore, str]]:
        return TokenStore.split, (self.store, self.name)

    def read(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Gather pieces end to end.

        Args:
            starts: int64 [P], the first token of each piece.
            lengths: int64 [P], its tokens. A piece may span documents and shards.

        Returns:
            Their tokens, int64 [lengths.sum()].

        Raises:
            ValueError: a file cannot be read or is truncated.
        """
        return self._read(self._names, self._dtype, starts, lengths)

    def read_byte_counts(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The UTF-8 bytes of text that each of the tokens stands for which `read` gives, if `has_byte_counts`."""
        return self._read([count_file(name) for name in self._names], BYTE_COUNT, starts, lengths)

    def _read(
        self, names: list[str], dtype: np.dtype[Any], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        values = np.empty(int(lengths.sum()), dtype=dtype)
        buffer = values.view(np.uint8).data
        ranges = [(names[file], *place) for file, place in self._ranges(starts, lengths, dtype.itemsize)]
        if is_url(self.store.path):
            self._fetch(ranges, buffer)
        else:
            place = 0
            for file, first, size in ranges:
                self._read_file(file, first, buffer[place : place + size])
                place += size
        return values.astype(np.int64)

    def _ranges(
        self, starts: NDArray[np.int64], lengths: NDArray[np.int64], itemsize: int
    ) -> Iterator[tuple[int, tuple[int, int]]]:
        """File, and first byte and bytes in it, of all that must be read; pieces that adjoin are read at once."""
        stops = starts + lengths
        gaps = np.flatnonzero(starts[1:] != stops[:-1])
        firsts = np.append(starts[:1], starts[gaps + 1]).tolist()
        for first, stop in zip(firsts, np.append(stops[gaps], stops[-1:]).tolist(), strict=True):
            while first < stop:
                file = bisect_right(self._bounds, first) - 1
                end = min(stop, self._bounds[file + 1])
                yield file, ((first - self._bounds[file]) * itemsize, (end - first) * itemsize)
                first = end  # noqa: PLW2901

    def _read_file(self, name: str, first: int, buffer: memoryview) -> None:
        place = self.store.place(name)
        try:
            whole = os.preadv(self._descriptor(name), [buffer], first) == len(buffer)
        except OSError as error:
            raise SettingError(f"{place} cannot be read: {error.strerror}") from error
        if not whole:
            raise SettingError(f"{place} is truncated")

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            if len(self._open) >= MAX_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[name] = io.FileIO(Path(self.store.path, name))
        return self._open[name].fileno()

    def _fetch(self, ranges: list[tuple[str, int, int]], buffer: memoryview) -> None:
        """Ask for all ranges at once."""
        urls = [str(self.store.place(name)) for name, _, _ in ranges]

        def fetch() -> bytes:
            filesystem, _ = filesystem_of(str(self.store.path))
            starts, stops = [first for _, first, _ in ranges], [first + size for _, first, size in ranges]
            blocks = filesystem.cat_ranges(urls, starts, stops, on_error="raise")
            for url, (_, _, size), block in zip(urls, ranges, blocks, strict=True):
                if len(block) != size:
                    raise EOFError(f"{len(block)} of {size} bytes of {url} came")
            return b"".join(blocks)

        buffer[:] = retried(", ".join(sorted(set(urls))), fetch)


def token_files(manifest: Manifest, split: str) -> Iterator[tuple[str, int]]:
    """The files that hold a split's tokens, in order, and the tokens of each."""
    for number, tokens in enumerate(manifest.shards):
        if split in tokens:
            yield f"shards/{number:05}/{split}.bin", tokens[split]


def count_file(name: str) -> str:
    """The file that holds the byte counts of a file of tokens."""
    return f"{name.removesuffix('.bin')}.bytes"  # no .bin, for counts are no part of the data's identity


def checksum(place: Path | str) -> str:
    """blake2b of a file's content."""
    with open_binary(place) as stream:
        return hashlib.file_digest(stream, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Make a set of what lies at `path`."""
    with whole_file(path / "manifest.json") as stream:
        stream.write(json.dumps(asdict(manifest), indent=1).encode())


def _read_manifest(place: Path | str) -> Manifest:
    try:
        with open_binary(place) as stream:
            state: dict[str, Any] = json.loads(stream.read())
        version = state["format_version"]
        if not OLDEST_FORMAT_VERSION <= version <= FORMAT_VERSION:
            raise SettingError(
                f"{place} has format version {version}, this release reads {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}"
            )
        splits = {name: SplitSize(**size) for name, size in state.pop("splits").items()}
        return Manifest(splits=splits, **state)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SettingError(f"{place} is not the manifest of a prepared set: {error!r}") from error


def _map_array(path: Path, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        values = np.load(path, mmap_mode="r")
    except (EOFError, ValueError) as error:
        raise SettingError(f"{path} is not a whole array: {error}") from error
    if values.shape != shape:
        raise SettingError(f"{path} must have shape {shape}, it has {values.shape}")
    return np.asarray(values)
