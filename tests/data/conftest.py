"""Small corpora, tokenizers and stores that the data tests share."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.documents import Document
from nsa_lightning.data.shards import merge_shards, shard_path, write_shard
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

WORDS = ["def", "return", "import", "self", "été", "文字", "🙂", "0x7f", "\t", "\n\n", "    "]


class NumberingTokenizer:
    """Gives a text of n characters n tokens that no other document has, so that a batch tells where it came from."""

    vocab_size = 4096
    fingerprint = "numbering"
    end_of_text = "none"
    is_byte_level = True

    def __init__(self) -> None:
        self.next = 1

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        stops = self.next + np.cumsum([len(text) for text in texts])
        encoded = [np.arange(stop - len(text), stop) for text, stop in zip(texts, stops, strict=True)]
        self.next = int(stops[-1])
        assert self.next <= self.vocab_size
        return encoded

    def save(self, path: Path) -> None:
        path.write_text("{}")


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return train_tokenizer([" ".join(rng.choices(WORDS, k=200)) for _ in range(20)], 320)


@pytest.fixture
def make_store(tmp_path: Path) -> Callable[..., TokenStore]:
    """Store documents of given lengths in order, all for training; tokens are numbered from 1 through the store."""

    def make(lengths: Sequence[int], num_shards: int = 1, **fractions: float) -> TokenStore:
        documents = [Document(str(i), chr(97 + i % 26) * length) for i, length in enumerate(lengths)]
        path = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
        options: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0, **fractions}
        tokenizer: Any = NumberingTokenizer()
        for shard in range(num_shards):
            share = slice(len(documents) * shard // num_shards, len(documents) * (shard + 1) // num_shards)
            write_shard(shard_path(path, shard), documents[share], tokenizer, **options)
        return merge_shards(path, num_shards, tokenizer, **options)

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A directory of 60 short texts, no two alike."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = random.Random(1)
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"text {i} " + " ".join(rng.choices(WORDS, k=rng.randint(3, 60))))
    return folder


@pytest.fixture
def make_data(corpus: Path, tmp_path: Path) -> Callable[..., PackedTextDataModule]:
    def make(**settings: Any) -> PackedTextDataModule:
        defaults = {
            "sources": [str(corpus)],
            "tokenizer": TokenizerConfig(vocab_size=300),
            "seq_len": 128,
            "batch_size": 2,
            "val_fraction": 0.2,
            "test_fraction": 0.1,
            "num_workers": 0,
            "cache_dir": str(tmp_path / "cache"),
        }
        return PackedTextDataModule(**{**defaults, **settings})

    return make
