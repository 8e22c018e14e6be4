"""Prepared sets to batches: what `nsa fit` reads, and where it goes on after a stop."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from numpy.typing import NDArray

from nsa_lightning.data.best_fit import BEST_FIT
from nsa_lightning.data.dataset import PackedDataset, PackedSplit
from nsa_lightning.data.loader import PackedLoader, ResumableLoader
from nsa_lightning.data.order import ORDER, InTurn, Order, Shuffled
from nsa_lightning.data.packing import SEQUENTIAL
from nsa_lightning.data.plan import make_plan
from nsa_lightning.data.prepare import prepare
from nsa_lightning.data.sets import MixtureSet, Packing, check_origin, common_tokenizer, open_set
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.splits import SPLITS
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.paths import expand_path

Loader = TypeVar("Loader", bound=PackedLoader)

_RULES = {"sequential": SEQUENTIAL, "best_fit": BEST_FIT}


class PackedTextDataModule(L.LightningDataModule):
    """Tokens of text files or of prepared sets, packed into sequences of `seq_len`.

    Exactly one of `sources`, `prepared` and `mixture` says where the text comes from.

    Args:
        prepared: the directory or URL of a set that `nsa prepare` made.
        mixture: prepared sets by name, each with a weight: its share of the sequences. An epoch lasts until every set
            has been seen in full, smaller ones begin again.
        packing: sequential cuts documents at the end of a sequence and lets them go on in another one; best_fit fits
            whole documents together, cuts only those longer than `seq_len` and pads what stays free.
        seq_len: tokens in a sequence.
        curriculum: optimizer steps, the first of them 0, each with the longest piece of a document from there on:
            `{0: 8192, 2000: 32768}`. Longer ones are cut into documents of their own; sequences stay as long.
        batch_size: sequences in a step on each rank.
        seed: shuffles the sequences, anew each epoch.
        num_workers: processes that make batches; 0 makes them in the training process.
        cache_dir: where tokenizers, tokens and plans are kept; left out, `$XDG_CACHE_HOME/nsa-lightning` or
            `~/.cache/nsa-lightning`.
        verify_checksums: read every file of the sets before the start, and compare it with its checksum.
        text: the settings of `TextSettings`, `sources` among them, which are prepared once, in the cache.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        *,
        prepared: str | None = None,
        mixture: dict[str, MixtureSet] | None = None,
        packing: Packing = "sequential",
        seq_len: int = 8192,
        curriculum: dict[int, int] | None = None,
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 1,
        cache_dir: str | None = None,
        verify_checksums: bool = False,
        **text: Any,
    ) -> None:
        super().__init__()
        check_arguments(PackedTextDataModule.__init__, locals(), "data.")
        self.text = TextSettings(**text)
        self.prepared = prepared
        self.mixture = dict(sorted((mixture or {}).items()))  # the order in which they are written changes nothing
        self.packing: Packing = packing
        self.seq_len = seq_len
        self.curriculum = curriculum or {}
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = _cache_dir(cache_dir)
        self.verify_checksums = verify_checksums
        self._check_settings()
        self._places: list[str] | None = None
        self._tokenizer: Tokenizer | None = None
        self._stores: list[TokenStore] = []
        self._loaders: dict[str, PackedLoader] = {}
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
    def stores(self) -> list[TokenStore]:
        """The prepared sets, once `setup` has opened them."""
        assert self._stores, "setup() opens the sets"
        return self._stores

    @property
    def unigram_bits_per_byte(self) -> float:
        """What a model that knows only how frequent each token is reaches on the validation split.

        The counts are those of the training split, of a mixture each set's by its weight, with one added to each. A
        document's first token is not predicted.
        """
        self._check_split("val")
        train, val = (np.stack([store.token_counts(split) for store in self.stores]) for split in ("train", "val"))
        totals, val_counts = train.sum(axis=1), val.sum(axis=0)
        counts = self._shares * totals.sum() / np.maximum(totals, 1) @ train
        bits = val_counts @ -np.log2((counts + 1) / (counts + 1).sum())
        return float(bits / sum(map(self._scored_bytes, self.stores)))

    def prepare_data(self) -> None:
        """Tokenise the sources and plan the sequences, unless the cache has them; verify the sets if asked to."""
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingError(f"data.cache_dir={str(self.cache_dir)!r} cannot be made: {error.strerror}") from error
        self._places = [self._prepare_sources()] if self.text.sources else list(self._configured.values())
        for store in self._open_sets():
            if self.verify_checksums:
                store.verify()
            for split in SPLITS:
                if store.manifest.splits[split].documents:
                    self._packed(store, split)

    def setup(self, stage: str) -> None:
        """Open what `prepare_data` found or left in the cache."""
        if self.trainer is not None:
            self._places = self.trainer.strategy.broadcast(self._places)
        if self._places is None:
            self.prepare_data()
        self._stores = self._open_sets()
        self._tokenizer = common_tokenizer(dict(zip(self._configured, self._stores, strict=True)), self.text.tokenizer)
        for store in self._stores:
            if store.manifest.first_bytes is None and not self._tokenizer.is_byte_level:
                rank_zero_warn(
                    f"{store.path} was prepared by an earlier release, which did not count the bytes that its tokens "
                    "stand for: bits per byte are an estimate; prepare it again to have them exact"
                )
        for split in {"fit": ("train", "val"), "test": ("test",)}.get(stage, ("val",)):
            if not (stage == "fit" and split == "val" and not self._has_validation()):
                self._check_split(split)
        if stage == "fit":
            self._train_state = self._train_loader = None

    def train_dataloader(self) -> PackedLoader:
        """Shuffled epochs without end, from where a checkpoint left them."""
        splits = [self._packed(store, "train") for store in self.stores]
        sizes = [split.plan.num_sequences for split in splits]
        dataset = self._dataset(splits, Shuffled(sizes, self._weights, self.seed))
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            return self._loader("train", PackedLoader, dataset)
        loader = self._loader(
            "train",
            ResumableLoader,
            dataset,
            fingerprint=self._fingerprint(),
            curriculum=self.curriculum,
            accumulate=getattr(self.trainer, "accumulate_grad_batches", 1),
            limit=getattr(self.trainer, "limit_train_batches", 1.0),
        )
        if self._train_loader is not None:
            loader.load_state_dict(self._train_loader.state_dict())
        elif self._train_state is not None:
            loader.load_state_dict(self._train_state)
        elif self.trainer is not None:
            loader.epoch = self.trainer.current_epoch
        if self._train_loader is None:
            self._report(splits)
        self._train_loader = loader
        return loader

    def val_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """The validation splits of all sets in order; nothing if they were prepared without."""
        return self._in_turn("val") if self._has_validation() else []

    def test_dataloader(self) -> PackedLoader:
        """The test splits of all sets in order."""
        return self._in_turn("test")

    def predict_dataloader(self) -> PackedLoader | list[PackedLoader]:
        """The validation splits."""
        return self.val_dataloader()

    def teardown(self, stage: str) -> None:
        """End the workers."""
        for loader in self._loaders.values():
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
            trained = self.text.sources and not self.text.tokenizer.path
            origin = ", trained on what data.sources hold now" if trained else ""
            remedy = (
                "set data.tokenizer.path to the tokenizer.json beside that run's config.yaml"
                if self.text.sources
                else "use sets that were prepared with the tokenizer.json beside that run's config.yaml"
            )
            raise SettingError(
                f"the checkpoint was trained with tokenizer {old[0]} (vocabulary {old[1]}), "
                f"the data has {new[0]} (vocabulary {new[1]}){origin}; {remedy}"
            )
        self._train_state = state_dict["train"]

    def _check_settings(self) -> None:
        choice = {"data.include": self.text.include, "data.exclude": self.text.exclude}
        check_origin(self.text.sources, self.prepared, self.mixture, choice)
        for name, least in {"seq_len": 2, "batch_size": 1, "seed": 0, "num_workers": 0}.items():
            if getattr(self, name) < least:
                raise SettingError(f"data.{name} must be at least {least}, got {getattr(self, name)}")
        if self.batch_size * self.seq_len >= 2**31:
            raise SettingError(
                f"data.batch_size times data.seq_len must be below 2**31, got {self.batch_size} and {self.seq_len}"
            )
        _check_curriculum(self.curriculum, self.seq_len)

    def _check_split(self, split: str) -> None:
        empty = [store for store in self.stores if not store.manifest.splits[split].documents]
        if not empty or (split != "train" and len(empty) < len(self.stores)):
            return
        manifest = empty[0].manifest
        total, prefix = manifest.num_documents, "data." if self.text.sources else f"{empty[0].path} was prepared with "
        if split == "train":
            fractions = f"val_fraction={manifest.val_fraction} and test_fraction={manifest.test_fraction}"
            raise SettingError(f"{prefix}{fractions}, which leave no training document among {total}; lower them")
        word = {"val": "validation", "test": "test"}[split]
        fraction = {"val": manifest.val_fraction, "test": manifest.test_fraction}[split]
        raise SettingError(
            f"{prefix}{split}_fraction={fraction}, which leaves no {word} document among {total}; "
            f"raise it{', set it to 0 to train without' if split == 'val' and fraction else ''} or add documents"
        )

    def _prepare_sources(self) -> str:
        """The directory of the set in the cache that holds `sources`."""
        plan = make_plan(self.text)
        path = self.cache_dir / f"set-{plan.fingerprint}"
        prepare(plan, path)
        return str(path)

    @property
    def _configured(self) -> dict[str, str]:
        """Where the sets lie, by the settings that name them; empty for `sources`, whose set is known later."""
        if self.mixture:
            return {f"data.mixture.{name}.prepared": each.prepared for name, each in self.mixture.items()}
        return {"data.prepared": self.prepared} if self.prepared else {"data.sources": ""}

    @property
    def _weights(self) -> dict[str, float]:
        """The weight of each set by its name; one that is not mixed has none."""
        return {name: each.weight for name, each in self.mixture.items()} or {"": 1.0}

    @property
    def _shares(self) -> NDArray[np.float64]:
        """The share of the training sequences that comes from each set."""
        weights = np.array(list(self._weights.values()))
        return weights / weights.sum()

    def _open_sets(self) -> list[TokenStore]:
        assert self._places is not None
        return [open_set(*named, self.cache_dir) for named in zip(self._configured, self._places, strict=True)]

    def _scored_bytes(self, store: TokenStore) -> int:
        """Bytes of the validation documents, without their first tokens."""
        if store.manifest.first_bytes is None:
            return int(store.token_counts("val") @ self.tokenizer.byte_lengths)
        return store.manifest.splits["val"].bytes - store.manifest.first_bytes["val"]

    def _has_validation(self) -> bool:
        return any(store.manifest.val_fraction > 0 for store in self.stores)

    def _fingerprint(self) -> dict[str, str | int | float]:
        """What the order of the training data depends on, by the name of its setting."""
        data: dict[str, str | int | float] = {"data.tokenizer": self.tokenizer.fingerprint}
        if self.mixture:
            for (name, each), store in zip(self.mixture.items(), self.stores, strict=True):
                data |= {f"data.mixture.{name}.prepared": store.fingerprint, f"data.mixture.{name}.weight": each.weight}
        else:
            manifest = self.stores[0].manifest
            data |= {"data.val_fraction": manifest.val_fraction, "data.test_fraction": manifest.test_fraction}
            data["data.sources or data.prepared"] = manifest.fingerprint
        rules = f"{_RULES[self.packing]} {ORDER}"
        return {**data, "data.packing": rules, "data.seq_len": self.seq_len, "data.seed": self.seed}

    def _packed(self, store: TokenStore, split: str) -> PackedSplit:
        return PackedSplit(store, split, self.seq_len, self.packing, self.cache_dir)

    def _in_turn(self, split: str) -> PackedLoader:
        splits = [self._packed(store, split) for store in self.stores if store.manifest.splits[split].documents]
        order = InTurn([each.plan.num_sequences for each in splits])
        return self._loader(split, PackedLoader, self._dataset(splits, order))

    def _dataset(self, splits: list[PackedSplit], order: Order) -> PackedDataset:
        lengths = self.tokenizer.byte_lengths
        if splits[0].tokens.name == "train" and not self.tokenizer.is_byte_level:
            lengths = np.zeros_like(lengths)  # they would be an estimate, and nobody asks for them
        return PackedDataset(splits, order, lengths, self.tokenizer.end_of_text_id)

    def _loader(self, split: str, kind: type[Loader], dataset: PackedDataset, **options: Any) -> Loader:
        """The loader of a split; the one before it, if there was one, ends its workers."""
        replicas = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        if replicas:
            options |= {"rank": replicas["rank"], "world_size": replicas["num_replicas"]}
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        loader = kind(dataset, batch_size=self.batch_size, num_workers=self.num_workers, pin_memory=on_gpu, **options)
        if split in self._loaders:
            self._loaders[split].close()
        self._loaders[split] = loader
        return loader

    def _report(self, splits: list[PackedSplit]) -> None:
        """Log once how much of the training sequences is padding, and how many documents are cut."""
        if self.trainer is None or not self.trainer.is_global_zero:
            return
        sequences = sum(split.plan.num_sequences for split in splits)
        documents = sum(split.tokens.num_documents for split in splits)
        padding = (
            float(self._shares @ [split.num_padding / split.plan.num_sequences for split in splits]) / self.seq_len
        )
        cut = sum(split.plan.cut_documents() for split in splits)
        rank_zero_info(
            f"{self.packing} packing: {documents} documents in {sequences} sequences of {self.seq_len} tokens, "
            f"{padding:.2%} padding, {cut} documents cut"
        )
        for logger in self.trainer.loggers:
            logger.log_metrics({"data/padding_fraction": padding, "data/cut_documents": cut}, step=0)


def _check_curriculum(curriculum: Mapping[int, int], seq_len: int) -> None:
    steps, lengths = sorted(curriculum), [curriculum[step] for step in sorted(curriculum)]
    if steps and steps[0] != 0:
        raise SettingError(f"data.curriculum must begin with step 0, got {steps[0]}")
    if lengths != sorted(lengths) or any(not 2 <= length <= seq_len for length in lengths):
        raise SettingError(
            f"data.curriculum must have ascending lengths from 2 to data.seq_len={seq_len}, got {lengths}"
        )


def _cache_dir(path: str | None) -> Path:
    if path is not None:
        return Path(expand_path(path))
    return Path(expand_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "nsa-lightning"
