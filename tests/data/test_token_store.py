import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.data.documents import Document
from nsa_lightning.data.shards import merge_shards, read_shard, shard_path, write_shard
from nsa_lightning.data.splits import SPLITS, split_of
from nsa_lightning.data.token_store import MAX_OPEN, TokenStore
from nsa_lightning.data.tokenizer import Tokenizer

TEXTS = [f"text {i} " + "def été 🙂 " * (i % 7) for i in range(100)]
FRACTIONS = {"val_fraction": 0.2, "test_fraction": 0.1}


def documents(texts: list[str] = TEXTS) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(texts)]


def build(path: Path, tokenizer: Any, num_shards: int = 3, texts: list[str] = TEXTS, **options: Any) -> TokenStore:
    for shard in range(num_shards):
        share = documents(texts[len(texts) * shard // num_shards : len(texts) * (shard + 1) // num_shards])
        write_shard(shard_path(path, shard), share, tokenizer, **FRACTIONS, **options)
    return merge_shards(path, num_shards, tokenizer, **FRACTIONS)


def split_tokens(store: TokenStore, split: str) -> list[list[int]]:
    """The tokens of each document."""
    part = store.split(split)
    return [
        part.read(part.offsets[i : i + 1], np.diff(part.offsets)[i : i + 1]).tolist()
        for i in range(len(part.offsets) - 1)
    ]


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> TokenStore:
    return build(tmp_path / "set", tokenizer)


def test_each_split_holds_the_tokens_of_its_documents_in_order(store: TokenStore, tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        texts = [text for text in TEXTS if split_of(text, **FRACTIONS) == split]
        encoded = [tokens.tolist() for tokens in tokenizer.encode_batch(texts)]
        assert split_tokens(store, split) == encoded
        size = store.manifest.splits[split]
        assert size.documents == store.split(split).num_documents == len(texts) > 0
        assert size.tokens == store.split(split).num_tokens == sum(map(len, encoded))
        assert size.bytes == sum(len(text.encode()) for text in texts)
        followers = np.concatenate([tokens[1:] for tokens in encoded])
        assert np.array_equal(store.token_counts(split), np.bincount(followers, minlength=tokenizer.vocab_size))
    assert store.load_tokenizer().fingerprint == tokenizer.fingerprint
    store.verify()


@given(st.data())
def test_any_pieces_are_read_end_to_end_over_all_shards(
    make_numbered: Callable[..., TokenStore], data: st.DataObject
) -> None:
    split = make_numbered().split("train")
    starts = data.draw(st.lists(st.integers(0, split.num_tokens), max_size=8))
    lengths = [data.draw(st.integers(0, split.num_tokens - start)) for start in starts]
    read = split.read(np.array(starts, dtype=np.int64), np.array(lengths, dtype=np.int64))
    assert read.dtype == np.int64
    expected = [token for start, length in zip(starts, lengths, strict=True) for token in range(start, start + length)]
    assert read.tolist() == [token + 1 for token in expected]


@pytest.fixture(scope="module")
def make_numbered(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenStore]:
    """A store of one token a file, each its place in the split and one; more files than are kept open."""

    class Numbering:
        vocab_size, fingerprint, end_of_text, is_byte_level, next = 4096, "numbering", "none", True, 0

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            self.next += len(texts)
            return [np.array([number]) for number in range(self.next - len(texts) + 1, self.next + 1)]

        def save(self, path: Path) -> None:
            path.write_text("{}")

    path = tmp_path_factory.mktemp("numbered") / "set"
    tokenizer: Any = Numbering()
    none = {"val_fraction": 0.0, "test_fraction": 0.0}
    for shard in range(MAX_OPEN + 6):
        write_shard(shard_path(path, shard), documents(["text"] * (shard % 3)), tokenizer, **none)
    store = merge_shards(path, MAX_OPEN + 6, tokenizer, **none)
    assert len(store.manifest.checksums) > MAX_OPEN * 2 / 3
    return lambda: store


def test_a_shards_documents_are_shuffled_by_seed_and_shard_within_blocks(tmp_path: Path, tokenizer: Tokenizer) -> None:
    plain = build(tmp_path / "plain", tokenizer)
    stores = {order: build(tmp_path / str(order), tokenizer, order=order) for order in [(0, 0), (0, 1), (1, 0)]}
    again = build(tmp_path / "again", tokenizer, order=(0, 0))
    trains = [split_tokens(store, "train") for store in [plain, *stores.values()]]
    assert all(sorted(train) == sorted(trains[0]) for train in trains)
    assert len({json.dumps(train) for train in trains}) == len(trains)
    assert again.manifest == stores[0, 0].manifest
    blocks = build(tmp_path / "blocks", tokenizer, order=(0, 0), block_size=1)  # a block ends with a batch: here one
    assert blocks.fingerprint == again.fingerprint


def test_the_fingerprint_is_that_of_tokens_and_bounds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first, same = build(tmp_path / "a", tokenizer), build(tmp_path / "b", tokenizer)
    others = [build(tmp_path / "c", tokenizer, texts=TEXTS[1:]), build(tmp_path / "d", tokenizer, order=(0, 0))]
    assert first.fingerprint == same.fingerprint
    assert len({store.fingerprint for store in [first, *others]}) == 3


def test_empty_documents_are_skipped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = build(tmp_path / "set", tokenizer, texts=["", "def", "", "é"])
    assert (store.manifest.num_documents, store.manifest.empty_documents) == (2, 2)


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_data_without_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"data.sources must hold text, got {len(texts)} empty documents and no other"):
        build(tmp_path / "set", tokenizer, texts=texts)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path: Path) -> None:
    class Wide:
        vocab_size, fingerprint, end_of_text, is_byte_level = 2**16 + 1, "wide", "none", True

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array([2**16, 1]) for _ in texts]

        def save(self, path: Path) -> None:
            path.write_text("{}")

    store = build(tmp_path / "wide", Wide(), texts=["x"], num_shards=1)
    assert store.manifest.dtype == "uint32"
    assert [tokens for split in SPLITS for tokens in split_tokens(store, split)] == [[2**16, 1]]


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def broken() -> Iterator[Document]:
        yield Document("0", "x" * 10)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        write_shard(tmp_path / "shard", broken(), tokenizer, **FRACTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_not_whole_is_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_shard(tmp_path / "shard", documents(), tokenizer, **FRACTIONS)
    assert read_shard(tmp_path / "shard", "uint16") is not None
    assert read_shard(tmp_path / "other", "uint16") is None
    truncate(tmp_path / "shard" / "train.bin")
    assert read_shard(tmp_path / "shard", "uint16") is None


def test_a_pickled_store_is_a_path_that_is_opened_anew(store: TokenStore) -> None:
    for pickled in pickle.dumps(store), pickle.dumps(store.split("train")):
        assert len(pickled) < 500
    assert split_tokens(pickle.loads(pickle.dumps(store)), "train") == split_tokens(store, "train")
    assert pickle.loads(pickle.dumps(store.split("val"))).num_tokens == store.split("val").num_tokens


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def replace_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 7'))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shards/00001/train.bin", truncate, r"shards/00001/train.bin must have \d+ bytes, it has \d+"),
        ("shards/00002/val.bin", Path.unlink, "No such file or directory: .*shards/00002/val.bin"),
        ("train.offsets.npy", truncate, "train.offsets.npy is not a whole array"),
        ("val.offsets.npy", lambda path: np.save(path, np.zeros(3)), r"val.offsets.npy must have shape \(\d+,\)"),
        ("counts.npy", Path.unlink, "No such file or directory: .*counts.npy"),
        ("manifest.json", truncate, "manifest.json is not the manifest of a prepared set: JSONDecodeError"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json is not the manifest of .*: KeyError"),
        ("manifest.json", replace_version, "manifest.json has format version 7, this release reads 2 to 3"),
    ],
)
def test_a_damaged_set_names_the_file_and_the_remedy(
    store: TokenStore, name: str, damage: Callable[[Path], object], message: str
) -> None:
    damage(Path(store.path, name))
    with pytest.raises(ValueError, match=f"{message}.*; delete .*manifest.json and what is damaged, and prepare again"):
        [TokenStore(store.path).split(split).num_tokens + len(store.token_counts(split)) for split in SPLITS]


def test_a_directory_without_a_manifest_is_no_set(store: TokenStore) -> None:
    Path(store.path, "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=f"{store.path} is not a whole prepared set, it has no manifest.json: nsa prepare"
    ):
        TokenStore(store.path)


def test_verify_names_every_file_that_differs(store: TokenStore) -> None:
    for name in "shards/00000/train.bin", "counts.npy":
        path = Path(store.path, name)
        path.write_bytes(path.read_bytes()[:-1] + b"\x5a")
    with pytest.raises(ValueError, match=r"counts.npy must have checksum .*shards/00000/train.bin must have checksum"):
        TokenStore(store.path).verify()


def test_another_tokenizer_in_the_set_is_refused(store: TokenStore) -> None:
    path = Path(store.path, "tokenizer.json")
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match=r"tokenizer.json is tokenizer \w+, the tokens were made by \w+"):
        store.load_tokenizer()


@pytest.fixture
def url(store: TokenStore) -> Iterator[str]:
    """The same set in fsspec's memory."""
    fsspec.filesystem("memory").put(str(store.path), "/bucket/set", recursive=True)
    yield "memory://bucket/set"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_set_behind_a_url_reads_as_the_local_one(store: TokenStore, url: str, tmp_path: Path) -> None:
    remote = TokenStore(url, tmp_path / "cache")
    remote.verify()
    assert remote.manifest == store.manifest
    for split in SPLITS:
        assert split_tokens(remote, split) == split_tokens(store, split)
        starts, lengths = np.array([7, 0]), np.array([store.split(split).num_tokens - 7, 7])
        assert np.array_equal(remote.split(split).read(starts, lengths), store.split(split).read(starts, lengths))
        assert np.array_equal(remote.token_counts(split), store.token_counts(split))
    assert remote.load_tokenizer().fingerprint == store.manifest.tokenizer
    assert isinstance(pickle.loads(pickle.dumps(remote)).split("train").offsets.base, np.memmap)


def test_a_range_that_fails_is_read_again_and_named_when_it_fails_for_good(
    store: TokenStore, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = TokenStore(url, tmp_path / "cache").split("train")
    answers: list[Any] = [TimeoutError("slow"), [b"short"], None]
    whole = MemoryFileSystem.cat_ranges

    def flaky(self: MemoryFileSystem, *args: Any, **options: Any) -> list[bytes]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer or whole(self, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", flaky)
    monkeypatch.setattr("nsa_lightning.data.storage.PAUSES", (0.0, 0.0))
    starts, lengths = np.array([3]), np.array([20])
    assert np.array_equal(split.read(starts, lengths), store.split("train").read(starts, lengths))
    answers[:] = [TimeoutError("slow")] * 3
    message = "memory://bucket/set/shards/00000/train.bin cannot be read, 3 attempts failed: TimeoutError: slow"
    with pytest.raises(ValueError, match=message):
        split.read(starts, lengths)


def test_offsets_that_differ_from_their_checksum_are_not_kept(url: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/set/train.offsets.npy", b"other")
    with pytest.raises(
        ValueError, match=r"train.offsets.npy differs from its checksum; .* copy the prepared set to .* again"
    ):
        TokenStore(url, tmp_path / "cache").split("train")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_set_behind_a_url_needs_a_cache(url: str) -> None:
    with pytest.raises(ValueError, match=r"needs data.cache_dir for its offsets, got none"):
        TokenStore(url).split("train")


def test_an_unknown_protocol_is_named() -> None:
    with pytest.raises(ValueError, match=r"nowhere://set/manifest.json cannot be read: Protocol not known: nowhere"):
        TokenStore("nowhere://set")
