import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig

STEPS = 20  # three epochs of the corpus and some


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


class Recorder(L.LightningModule):
    """Learns nothing and notes the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[PackedBatch] = []
        self.evaluated: list[PackedBatch] = []

    def training_step(self, batch: PackedBatch) -> torch.Tensor:
        self.batches.append(batch)
        return self.weight * 0.0

    def validation_step(self, batch: PackedBatch) -> None:
        self.evaluated.append(batch)

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    @property
    def stream(self) -> list[list[int]]:
        return [batch.tokens.tolist() for batch in self.batches]


def trainer(callback: L.Callback | None = None, **options: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": callback is not None,
        "callbacks": callback,
    }
    return L.Trainer(**{**defaults, **options})


def fit(
    data: PackedTextDataModule, callback: L.Callback | None = None, ckpt: str | None = None, **options: Any
) -> Recorder:
    recorder = Recorder()
    trainer(callback, **options).fit(recorder, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return recorder


def step_of(path: Path) -> int:
    match = re.search(r"step=(\d+)", path.name)
    assert match
    return int(match[1])


@pytest.mark.parametrize(
    "when",
    [
        {"every_n_train_steps": 1},
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_epochs": 1, "save_on_train_epoch_end": False},
    ],
    ids=["any step", "epoch end", "validation end"],
)
@pytest.mark.parametrize("until", [{"max_steps": STEPS}, {"max_epochs": 3}], ids=["steps", "epochs"])
def test_a_fit_that_resumes_sees_what_one_run_sees(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, when: dict[str, Any], until: dict[str, int]
) -> None:
    saving = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}-{step}", save_top_k=-1, **when)
    whole = fit(make_data(), saving, **until).stream
    checkpoints = sorted((tmp_path / "checkpoints").iterdir(), key=step_of)
    for checkpoint in checkpoints:
        resumed = fit(make_data(), ckpt=str(checkpoint), **until).stream
        assert resumed == whole[step_of(checkpoint) :], checkpoint.name
    assert len(checkpoints) >= 3
    assert len({str(tokens) for tokens in whole}) == len(whole) >= 18


def test_a_resume_with_other_workers_and_a_limited_epoch_sees_the_same(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    options = {"max_steps": STEPS, "limit_train_batches": 4}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    whole = fit(make_data(num_workers=2), saving, **options).stream
    resumed = fit(make_data(num_workers=1), ckpt=str(tmp_path / "step=7.ckpt"), **options).stream
    assert resumed == whole[7:]
    assert whole == fit(make_data(), max_steps=STEPS).stream


def test_a_run_resumes_on_another_number_of_ranks(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(rank: int, world_size: int, *, saving: L.Callback | None = None, ckpt: str | None = None) -> Recorder:
        replicas = {"rank": rank, "num_replicas": world_size}
        monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", replicas)
        return fit(make_data(batch_size=1), saving, ckpt, max_epochs=2)

    alone = run(0, 1)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    ranks = [run(0, 3, saving=saving), run(1, 3), run(2, 3)]
    together = [tokens for step in zip(*(rank.stream for rank in ranks), strict=True) for tokens in step]
    resumed = run(0, 1, ckpt=str(tmp_path / "step=2.ckpt"))
    per_epoch = len(alone.stream) // 2
    assert together[:per_epoch] == alone.stream[:per_epoch]
    assert resumed.stream == alone.stream[6:]


def test_the_other_order_of_each_epoch_and_seed_has_the_same_documents(
    make_data: Callable[..., PackedTextDataModule],
) -> None:
    def documents(stream: list[list[int]]) -> list[int]:
        return sorted(token for tokens in stream for token in tokens)

    stream = fit(make_data(), max_epochs=2).stream
    first, second = stream[: len(stream) // 2], stream[len(stream) // 2 :]
    other = fit(make_data(seed=5), max_epochs=1).stream
    assert documents(first) == documents(second) == documents(other)
    assert len({str(epoch) for epoch in (first, second, other)}) == 3


def test_overfit_batches_repeats_the_same_batches(make_data: Callable[..., PackedTextDataModule]) -> None:
    stream = fit(make_data(), max_epochs=3, overfit_batches=2, limit_val_batches=0).stream
    assert stream == stream[:2] * 3
    assert stream[0] != stream[1]


def test_reloading_the_loaders_goes_on_with_the_stream(make_data: Callable[..., PackedTextDataModule]) -> None:
    plain = fit(make_data(), max_epochs=3).stream
    assert fit(make_data(), max_epochs=3, reload_dataloaders_every_n_epochs=1).stream == plain


def test_every_held_out_document_is_evaluated_once(make_data: Callable[..., PackedTextDataModule]) -> None:
    data, recorder = make_data(num_workers=1), Recorder()
    for run, split in (("validate", "val"), ("test", "test"), ("predict", "val")):
        recorder.evaluated.clear()
        getattr(trainer(), run)(recorder, data)
        documents = data.store.documents(split)
        stored = np.concatenate([data.store.tokens[slice(*data.store.offsets[i : i + 2])] for i in documents])
        tokens = torch.cat([batch.tokens for batch in recorder.evaluated])
        assert tokens[: len(stored)].tolist() == stored.tolist()
        assert (tokens[len(stored) :] == data.tokenizer.end_of_text_id).all()
        assert len(stored) > 128


def test_a_batch_reaches_the_step_as_it_was_packed(make_data: Callable[..., PackedTextDataModule]) -> None:
    data = make_data(num_workers=1)
    batch = fit(data, max_steps=1).batches[0]
    assert type(batch) is PackedBatch
    assert (type(batch.max_seqlen), batch.max_seqlen) == (int, 128)
    assert batch.tokens.shape == (256,)
    scored = batch.targets[batch.targets != IGNORE_INDEX]
    assert batch.target_bytes.item() == data.tokenizer.byte_lengths[scored.numpy()].sum() > 100


TWO_RANKS = """
import sys, json, torch, lightning as L
from pathlib import Path
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.tokenizer import TokenizerConfig

class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stream = []

    def training_step(self, batch):
        self.stream.append(batch.tokens.tolist())
        return self.weight * 0.0

    def on_train_end(self):
        Path(sys.argv[2], f"rank{self.global_rank}.json").write_text(json.dumps(self.stream))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

data = PackedTextDataModule(
    sources=[sys.argv[1]], tokenizer=TokenizerConfig(vocab_size=300), seq_len=128, val_fraction=0.2, test_fraction=0.1,
    num_workers=1, cache_dir=sys.argv[2],
)
L.Trainer(
    accelerator="cpu", strategy="ddp_fork", devices=2, max_epochs=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False,
).fit(Recorder(), data)
"""


def test_two_processes_share_each_epoch_even_if_lightning_may_put_a_sampler_in(
    make_data: Callable[..., PackedTextDataModule], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-c", TWO_RANKS, str(corpus), str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    ranks = [__import__("json").loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    together = [tokens for step in zip(*ranks, strict=True) for tokens in step]
    alone = fit(make_data(batch_size=1), max_epochs=2).stream
    padding = [0] * 128
    assert [tokens for tokens in together if tokens != padding] == alone


def test_a_second_run_reads_the_cache(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data().prepare_data()
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr("nsa_lightning.data.datamodule.iter_documents", lambda *_: iter(()))
    data = make_data(seq_len=64)
    data.setup("fit")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == cached
    assert data.store.manifest.num_documents == 60


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0.3}, {"tokenizer": TokenizerConfig(vocab_size=310)}, {"exclude": ["1*.txt"]}]
)
def test_other_settings_make_another_store(
    make_data: Callable[..., PackedTextDataModule], change: dict[str, Any]
) -> None:
    data, other = make_data(), make_data(**change)
    data.setup("fit")
    other.setup("fit")
    assert data.store.path != other.store.path
    assert data.store.manifest != other.store.manifest


def test_changed_text_makes_another_store(make_data: Callable[..., PackedTextDataModule], corpus: Path) -> None:
    data, other = make_data(), make_data()
    data.setup("fit")
    (corpus / "00.txt").write_text("something else")
    other.setup("fit")
    assert data.store.path != other.store.path


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert PackedTextDataModule(sources=["x"]).cache_dir == tmp_path / ".cache" / "nsa-lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert PackedTextDataModule(sources=["x"]).cache_dir == tmp_path / "elsewhere" / "nsa-lightning"
    assert PackedTextDataModule(sources=["x"], cache_dir="~/mine").cache_dir == tmp_path / "mine"


def test_any_tokenizer_file_can_be_used(
    make_data: Callable[..., PackedTextDataModule], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    data = make_data(tokenizer=TokenizerConfig(path=str(tmp_path)))
    data.setup("fit")
    assert data.vocab_size == tokenizer.vocab_size == 320
    assert data.store.manifest.tokenizer == tokenizer.fingerprint
    assert not list((tmp_path / "cache").glob("*.json"))


def test_the_unigram_baseline_is_the_smoothed_cross_entropy(make_data: Callable[..., PackedTextDataModule]) -> None:
    data = make_data()
    data.setup("validate")

    def followers(split: str) -> list[int]:
        offsets, documents = data.store.offsets, data.store.documents(split)
        return [int(token) for i in documents for token in data.store.tokens[offsets[i] + 1 : offsets[i + 1]]]

    train, val = followers("train"), followers("val")
    frequency = [(train.count(token) + 1) / (len(train) + data.vocab_size) for token in range(data.vocab_size)]
    expected = -sum(np.log2(frequency[token]) for token in val) / data.store.manifest.splits["val"].bytes
    assert data.unigram_bits_per_byte == pytest.approx(expected)
    assert 1 < expected < 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "data.sources must be a list of files, directories or globs, got []"),
        ({"sources": "corpus"}, "data.sources must be a list of files, directories or globs, got 'corpus'"),
        ({"exclude": "*.pyc"}, "data.exclude must be a list of globs, got '*.pyc'"),
        ({"seq_len": 1}, "data.seq_len must be at least 2, got 1"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"seed": -1}, "data.seed must be at least 0, got -1"),
        ({"seq_len": 2**30, "batch_size": 2}, "data.batch_size times data.seq_len must be below 2**31"),
        ({"val_fraction": -0.1}, "must be 0 or more, below 1 in sum, got (-0.1, 0.1)"),
        ({"val_fraction": 0.9}, "must be 0 or more, below 1 in sum, got (0.9, 0.1)"),
    ],
)
def test_a_setting_out_of_range_is_named(
    make_data: Callable[..., PackedTextDataModule], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_data(**settings)


def test_a_split_without_documents_names_the_setting(make_data: Callable[..., PackedTextDataModule]) -> None:
    few = {"val_fraction": 1e-6, "test_fraction": 0.0}
    with pytest.raises(ValueError, match="data.val_fraction=1e-06 leaves no validation document among 60; raise it"):
        make_data(**few).setup("fit")
    with pytest.raises(ValueError, match=r"data.test_fraction=0.0 leaves no test document among 60; raise it"):
        make_data(**few).setup("test")
    with pytest.raises(
        ValueError, match=r"data.val_fraction=0.999999 and .* leave no training document among 60; lower"
    ):
        make_data(val_fraction=0.999999, test_fraction=0.0).setup("fit")


def test_a_fit_without_validation_can_be_asked_for(make_data: Callable[..., PackedTextDataModule]) -> None:
    data = make_data(val_fraction=0.0)
    assert fit(data, max_epochs=1).evaluated == []
    with pytest.raises(ValueError, match=r"data.val_fraction=0.0 leaves no validation document"):
        data.setup("validate")


def test_a_cache_that_cannot_be_made_is_named(make_data: Callable[..., PackedTextDataModule], corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.cache_dir='.*00.txt/cache' cannot be made: Not a directory"):
        make_data(cache_dir=str(corpus / "00.txt" / "cache")).setup("fit")


def test_a_checkpoint_of_another_tokenizer_is_refused(make_data: Callable[..., PackedTextDataModule]) -> None:
    data, other = make_data(), make_data(tokenizer=TokenizerConfig(vocab_size=310))
    data.setup("validate")
    other.setup("validate")
    message = f"trained with tokenizer {data.tokenizer.fingerprint} (vocabulary 300), data.tokenizer gives "
    with pytest.raises(ValueError, match=re.escape(message)):
        other.load_state_dict(data.state_dict())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seq_len": 64}, "data.seq_len"),
        ({"seed": 1}, "data.seed"),
        ({"exclude": ["00.txt"], "tokenizer": "saved"}, "data.sources"),
        ({"val_fraction": 0.15, "tokenizer": "saved"}, "data.val_fraction"),
    ],
)
def test_a_fit_cannot_resume_with_other_data_but_its_model_can_be_evaluated(
    make_data: Callable[..., PackedTextDataModule],
    tmp_path: Path,
    tokenizer: Tokenizer,
    change: dict[str, Any],
    name: str,
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    saved = TokenizerConfig(path=str(tmp_path))
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(make_data(tokenizer=saved), saving, max_steps=2)
    checkpoint = str(tmp_path / "step=2.ckpt")
    other = {**change, "tokenizer": saved}
    with pytest.raises(ValueError, match=f"{name} must stay as it was to resume"):
        fit(make_data(**other), ckpt=checkpoint, max_steps=4)
    recorder = Recorder()
    trainer().validate(recorder, make_data(**other), ckpt_path=checkpoint, weights_only=True)
    assert recorder.evaluated


def test_a_broken_tokenizer_in_the_cache_is_named(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    make_data().prepare_data()
    (path,) = (tmp_path / "cache").glob("tokenizer-*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path}.* is not a tokenizer.json: .*; delete it and run again"):
        make_data().setup("fit")


def test_the_settings_are_documented_and_parsed_by_the_command_line() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(PackedTextDataModule, "data")
    text = parser.format_help()
    for name in ("sources", "exclude", "text_field", "seq_len", "batch_size", "val_fraction", "seed", "cache_dir"):
        assert re.search(rf"--data\.{name} [^-]*\n? +\w.{{20}}", text), name
    assert "Number of tokens of the trained BPE" in text
    parsed = parser.parse_args(
        ["--data.sources=[a, b]", "--data.tokenizer.vocab_size=1024", "--data.exclude+=x", "--data.cache_dir=/tmp/c"]
    )
    data = parser.instantiate_classes(parsed).data
    assert list(data.sources) == ["a", "b"]
    assert data.tokenizer_config == TokenizerConfig(vocab_size=1024)


def test_importing_the_data_module_loads_no_library_before_it_is_needed() -> None:
    script = (
        "import sys; import lightning; before = set(sys.modules); import nsa_lightning.data.datamodule; "
        "print({'tokenizers', 'pyarrow', 'tqdm'} & (set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert printed.strip() == "set()"
