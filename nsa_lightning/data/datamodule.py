"""Files to batches: what `nsa fit` reads, and where it goes on after a stop."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import lightning as L
import numpy as np

from nsa_lightning.data.documents import fingerprint_files, iter_documents, resolve_files, split_of, text_bytes
from nsa_lightning.data.loader import PackedLoader, ResumableLoader
from nsa_lightning.data.packing import PackedDataset
from nsa_lightning.data.token_store import FORMAT_VERSION, TokenStore, build_token_store
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, train_tokenizer, training_sample

Loader = TypeVar("Loader", bound=PackedLoader)

PACKING = "sequential-1"
"""Names the rule that lays documents in sequences: data made by another rule cannot be resumed."""


class _Prepared(NamedTuple):
    """What one process found or made in the cache, for the others to open."""

    tokenizer: str  # path of a tokenizer.json
    store: Path
    corpus: str  # fingerprint_files


class PackedTextDataModule(L.LightningDataModule):
    """Text files, tokenised once into a cache and packed into sequences of `seq_len` tokens.

    Args:
        sources: files, directories and globs (`**` for any depth) of text, code, `.jsonl` and `.parquet`; text and
            jsonl also as `.gz`. `~` is expanded, and `{stdlib}` stands for Python's standard library.
        exclude: globs of files and directories to leave out; a relative one, such as `test_*.py`, at any depth.
        text_field: the field of a jsonl line, or the column of a parquet file, that holds the text.
        tokenizer: how text becomes tokens.
        seq_len: tokens in a sequence; a longer document goes on in the next one as a document of its own.
        batch_size: sequences in a step on each rank.
        val_fraction: share of documents held out for validation, by a hash of their text.
        test_fraction: share of documents held out for the test, by the same hash.
        seed: shuffles the training documents, anew each epoch.
        num_workers: processes that make batches; 0 makes them in the training process.
        cache_dir: where tokenizers and tokens are kept; left out, `$XDG_CACHE_HOME/nsa-lightning` or
            `~/.cache/nsa-lightning`.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        sources: Sequence[str] | str,
        exclude: Sequence[str] | str = (),
        text_field: str = "text",
        tokenizer: TokenizerConfig = TokenizerConfig(),  # noqa: B008  (frozen)
        seq_len: int = 8192,
        batch_size: int = 1,
        val_fraction: float = 0.01,
        test_fraction: float = 0.01,
        seed: int = 0,
        num_workers: int = 1,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.sources = [sources] if isinstance(sources, str) else list(sources)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.text_field = text_field
        self.tokenizer_config = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = _cache_dir(cache_dir)
        self._check_settings()
        self._prepared: _Prepared | None = None
        self._tokenizer: Tokenizer | None = None
        self._store: TokenStore | None = None
        self._loaders: list[PackedLoader] = []
        self._train_state: dict[str, Any] | None = None
        self._train_loader: ResumableLoader | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, once `setup` has opened it."""
        assert self._tokenizer is not None, "setup() opens the tokenizer"
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """The tokenizer's vocabulary."""
        return self.tokenizer.vocab_size

    @property
    def store(self) -> TokenStore:
        """The tokens, once `setup` has opened them."""
        assert self._store is not None, "setup() opens the tokens"
        return self._store

    @property
    def unigram_bits_per_byte(self) -> float:
        """What a model that knows only how frequent each token is reaches on the validation split.

        The frequencies are those of the training split, with one added to each. A document's first token is not
        predicted.
        """
        self._check_split("val")
        counts = self.store.token_counts("train") + 1
        val_counts = self.store.token_counts("val")
        bits = val_counts @ -np.log2(counts / counts.sum())
        return float(bits / (val_counts @ self.tokenizer.byte_lengths))

    def prepare_data(self) -> None:
        """Train the tokenizer and tokenise the sources, unless the cache has them."""
        files = resolve_files(self.sources, self.exclude)
        corpus = fingerprint_files(files, self.text_field)
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={str(self.cache_dir)!r} cannot be made: {error.strerror}") from error
        path = self.tokenizer_config.path or str(self._trained_tokenizer(files, corpus))
        tokenizer = self._open_tokenizer(path)
        name = _digest(FORMAT_VERSION, corpus, tokenizer.fingerprint, self.val_fraction, self.test_fraction)
        store = build_token_store(
            self.cache_dir / f"tokens-{name}",
            iter_documents(files, self.text_field),
            tokenizer,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            expected_bytes=text_bytes(files),
        )
        self._prepared = _Prepared(path, store.path, corpus)

    def setup(self, stage: str) -> None:
        """Open what `prepare_data` left in the cache."""
        if self.trainer is not None:
            self._prepared = self.trainer.strategy.broadcast(self._prepared)
        if self._prepared is None:
            self.prepare_data()
        assert self._prepared is not None
        self._tokenizer = self._open_tokenizer(self._prepared.tokenizer)
        self._store = TokenStore(self._prepared.store)
        for split in {"fit": ("train", "val"), "test": ("test",)}.get(stage, ("val",)):
            if not (stage == "fit" and split == "val" and self.val_fraction == 0):
                self._check_split(split)
        if stage == "fit":
            self._train_state = self._train_loader = None

    def train_dataloader(self) -> PackedLoader:
        """Shuffled epochs without end, from where a checkpoint left them."""
        dataset = self._dataset("train", self.seed)
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._loader(PackedLoader, dataset)
        loader = self._loader(ResumableLoader, dataset, fingerprint=self._fingerprint())
        if self._train_loader is not None:
            loader.load_state_dict(self._train_loader.state_dict())
        elif self._train_state is not None:
            loader.load_state_dict(self._train_state)
        elif self.trainer is not None:
            loader.epoch = self.trainer.current_epoch
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """The validation split in order; nothing if `val_fraction` is 0."""
        return self._loader(PackedLoader, self._dataset("val", None)) if self.val_fraction > 0 else []

    def test_dataloader(self) -> PackedLoader:
        """The test split in order."""
        return self._loader(PackedLoader, self._dataset("test", None))

    def predict_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """The validation split."""
        return self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """End the workers."""
        for loader in self._loaders:
            loader.close()
        self._loaders.clear()

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer's identity and the place in the training data, in plain types, the same on every rank."""
        train = self._train_state if self._train_loader is None else self._train_loader.state_dict()
        return {"tokenizer": self.tokenizer.fingerprint, "vocab_size": self.vocab_size, "train": train}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the place in the training data.

        Lightning loads the state of a train loader as well, but not where a checkpoint ended an epoch, and only after
        it has asked for the number of batches.

        Raises:
            ValueError: the checkpoint was trained with another tokenizer.
        """
        old = state_dict["tokenizer"], state_dict["vocab_size"]
        new = self.tokenizer.fingerprint, self.vocab_size
        if old != new:
            origin = "" if self.tokenizer_config.path else ", trained on what data.sources hold now"
            raise ValueError(
                f"the checkpoint was trained with tokenizer {old[0]} (vocabulary {old[1]}), "
                f"data.tokenizer gives {new[0]} (vocabulary {new[1]}){origin}; "
                "set data.tokenizer.path to the tokenizer.json beside that run's config.yaml"
            )
        self._train_state = state_dict["train"]

    def _check_settings(self) -> None:
        if not self.sources:
            raise ValueError("data.sources must name files, directories or globs, got none")
        for name, least in {"seq_len": 2, "batch_size": 1, "seed": 0, "num_workers": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if self.batch_size * self.seq_len >= 2**31:
            raise ValueError(
                f"data.batch_size times data.seq_len must be below 2**31, got {self.batch_size} and {self.seq_len}"
            )
        fractions = self.val_fraction, self.test_fraction
        if min(fractions) < 0 or sum(fractions) >= 1:
            raise ValueError(
                f"data.val_fraction and data.test_fraction must be 0 or more, below 1 in sum, got {fractions}"
            )

    def _check_split(self, split: str) -> None:
        if self.store.manifest.splits[split].documents > 0:
            return
        total = self.store.manifest.num_documents
        if split == "train":
            settings = f"data.val_fraction={self.val_fraction} and data.test_fraction={self.test_fraction}"
            raise ValueError(f"{settings} leave no training document among {total}; lower them")
        word = {"val": "validation", "test": "test"}[split]
        fraction = {"val": self.val_fraction, "test": self.test_fraction}[split]
        raise ValueError(
            f"data.{split}_fraction={fraction} leaves no {word} document among {total}; "
            "raise it, set it to 0 or add documents"
        )

    def _trained_tokenizer(self, files: list[Path], corpus: str) -> Path:
        """The path of a tokenizer trained on the training split."""
        vocab_size, fractions = self.tokenizer_config.vocab_size, (self.val_fraction, self.test_fraction)
        path = self.cache_dir / f"tokenizer-{_digest(FORMAT_VERSION, corpus, vocab_size, *fractions)}.json"
        if not path.exists():
            texts = (document.text for document in iter_documents(files, self.text_field))
            train = (text for text in texts if split_of(text, *fractions) == "train")
            train_tokenizer(training_sample(train), vocab_size).save(path)
        return path

    def _open_tokenizer(self, path: str) -> Tokenizer:
        if self.tokenizer_config.path is not None:
            return load_tokenizer(path, self.tokenizer_config.end_of_text)
        try:
            return load_tokenizer(path)
        except ValueError as error:
            raise ValueError(f"{error}; delete it and run again") from error

    def _fingerprint(self) -> dict[str, str | int | float]:
        """What the order of the training data depends on, by the name of its setting."""
        assert self._prepared is not None
        return {
            "data.sources": self._prepared.corpus,
            "data.tokenizer": self.tokenizer.fingerprint,
            "data.val_fraction": self.val_fraction,
            "data.test_fraction": self.test_fraction,
            "data.seq_len": self.seq_len,
            "data.seed": self.seed,
            "packing": PACKING,
        }

    def _dataset(self, split: str, seed: int | None) -> PackedDataset:
        return PackedDataset(
            self.store,
            split,
            seq_len=self.seq_len,
            seed=seed,
            byte_lengths=self.tokenizer.byte_lengths,
            padding=self.tokenizer.end_of_text_id,
        )

    def _loader(self, kind: type[Loader], dataset: PackedDataset, **options: Any) -> Loader:
        replicas = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        if replicas:
            options |= {"rank": replicas["rank"], "world_size": replicas["num_replicas"]}
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = kind(dataset, batch_size=self.batch_size, num_workers=self.num_workers, pin_memory=on_gpu, **options)
        self._loaders.append(loader)
        return loader


def _cache_dir(path: str | None) -> Path:
    if path is not None:
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nsa-lightning"


def _digest(*parts: str | int | float) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()
