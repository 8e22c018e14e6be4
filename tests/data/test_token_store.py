import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from nsa_lightning.data.documents import SPLITS, Document, split_of
from nsa_lightning.data.token_store import TokenStore, build_token_store
from nsa_lightning.data.tokenizer import Tokenizer

TEXTS = [f"text {i} " + "def été 🙂 " * (i % 7) for i in range(100)]
FRACTIONS = {"val_fraction": 0.2, "test_fraction": 0.1}


def documents(texts: list[str] = TEXTS) -> list[Document]:
    return [Document(str(i), text) for i, text in enumerate(texts)]


@pytest.fixture
def store(tmp_path: Path, tokenizer: Tokenizer) -> TokenStore:
    return build_token_store(tmp_path / "store", documents(), tokenizer, **FRACTIONS)


def test_a_store_holds_the_tokens_of_each_document_in_order(store: TokenStore, tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_batch(TEXTS)
    assert np.array_equal(store.offsets, np.cumsum([0, *map(len, encoded)]))
    assert np.array_equal(store.tokens, np.concatenate(encoded))
    assert store.tokens.dtype == np.uint16


def test_splits_share_no_document_and_follow_the_texts(store: TokenStore) -> None:
    for split in SPLITS:
        assert store.documents(split).tolist() == [
            i for i, text in enumerate(TEXTS) if split_of(text, **FRACTIONS) == split
        ]
        size = store.manifest.splits[split]
        assert size.documents == len(store.documents(split)) > 0
        assert size.tokens == np.diff(store.offsets)[store.documents(split)].sum()
        assert size.bytes == sum(len(TEXTS[i].encode()) for i in store.documents(split))


def test_counts_leave_out_each_documents_first_token(store: TokenStore, tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        followers = np.concatenate([tokenizer.encode_batch([TEXTS[i]])[0][1:] for i in store.documents(split)])
        assert np.array_equal(store.token_counts(split), np.bincount(followers, minlength=tokenizer.vocab_size))


def test_empty_documents_are_skipped_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = build_token_store(tmp_path / "store", documents(["", "def", "", "é"]), tokenizer, **FRACTIONS)
    assert (store.manifest.num_documents, store.manifest.empty_documents) == (2, 2)
    assert np.array_equal(store.tokens, np.concatenate(tokenizer.encode_batch(["def", "é"])))


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_data_without_text_is_an_error(tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    with pytest.raises(ValueError, match=f"data.sources must hold text, got {len(texts)} empty documents and no other"):
        build_token_store(tmp_path / "store", documents(texts), tokenizer, **FRACTIONS)
    assert list(tmp_path.iterdir()) == []


def test_many_batches_make_the_same_store_as_one(
    store: TokenStore, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_lightning.data.token_store.GROUP", 50)
    again = build_token_store(tmp_path / "again", documents(), tokenizer, **FRACTIONS)
    assert again.manifest == store.manifest
    for name in ("tokens.bin", "offsets.npy", "splits.npy", "counts.npy"):
        assert (again.path / name).read_bytes() == (store.path / name).read_bytes()


def test_a_large_vocabulary_is_stored_in_four_bytes(make_store: Callable[..., TokenStore], tmp_path: Path) -> None:
    class Wide:
        vocab_size = 2**16 + 1
        fingerprint = "wide"

        def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
            return [np.array([2**16, 1]) for _ in texts]

    store = build_token_store(tmp_path / "wide", documents(["x"]), Wide(), **FRACTIONS)  # type: ignore[arg-type]
    assert (store.tokens.dtype, store.tokens.tolist()) == (np.uint32, [2**16, 1])
    assert make_store([3]).tokens.dtype == np.uint16


def test_a_store_that_is_there_is_opened_and_not_built(store: TokenStore, tokenizer: Tokenizer) -> None:
    def untouched() -> Iterator[Document]:
        raise AssertionError("read again")
        yield

    assert build_token_store(store.path, untouched(), tokenizer, **FRACTIONS).manifest == store.manifest


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def broken() -> Iterator[Document]:
        yield Document("0", "x" * 10)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        build_token_store(tmp_path / "store", broken(), tokenizer, **FRACTIONS)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_leaves_no_store_and_the_next_one_succeeds(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    script = f"""
import os, signal
from pathlib import Path
from nsa_lightning.data.documents import Document
from nsa_lightning.data.token_store import build_token_store
from nsa_lightning.data.tokenizer import load_tokenizer

def documents():
    for i in range(20_000):
        yield Document(str(i), "some text")
    os.kill(os.getpid(), signal.SIGKILL)

tokenizer = load_tokenizer({str(tmp_path)!r})
build_token_store(Path({str(tmp_path)!r}, "store"), documents(), tokenizer, val_fraction=0.1, test_fraction=0.1)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (tmp_path / "store").exists()
    assert [path.name for path in tmp_path.glob("store.tmp-*/*")] == ["tokens.bin"]
    assert build_token_store(tmp_path / "store", documents(), tokenizer, **FRACTIONS).manifest.num_documents == 100


def test_the_first_of_two_builders_wins_and_the_other_drops_its_copy(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def slow() -> Iterator[Document]:
        yield from documents()
        build_token_store(tmp_path / "store", documents(["the", "faster", "one"]), tokenizer, **FRACTIONS)

    store = build_token_store(tmp_path / "store", slow(), tokenizer, **FRACTIONS)
    assert store.manifest.num_documents == 3
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_a_pickled_store_is_a_path_that_is_opened_anew(store: TokenStore) -> None:
    pickled = pickle.dumps(store)
    assert len(pickled) < 500
    assert np.array_equal(pickle.loads(pickled).tokens, store.tokens)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def replace_version(path: Path) -> None:
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 7'))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("tokens.bin", truncate, r"tokens.bin must have \d+ bytes, it has \d+"),
        ("offsets.npy", truncate, "offsets.npy is not a whole array"),
        (
            "splits.npy",
            lambda path: np.save(path, np.zeros(3, np.uint8)),
            r"splits.npy must have shape \(100,\)",
        ),
        ("counts.npy", Path.unlink, "No such file or directory: .*counts.npy"),
        ("manifest.json", truncate, "manifest.json is not a store's manifest: JSONDecodeError"),
        ("manifest.json", lambda path: path.write_text("{}"), "manifest.json is not a store's manifest: KeyError"),
        ("manifest.json", replace_version, "manifest.json has format version 7, this release reads 1"),
    ],
)
def test_a_damaged_store_names_the_file_and_what_to_delete(
    store: TokenStore, name: str, damage: Callable[[Path], object], message: str
) -> None:
    path = store.path
    damage(path / name)
    with pytest.raises(ValueError, match=f"{message}.*; delete the token store {path} and run again"):
        TokenStore(path)
    shutil.rmtree(path)
