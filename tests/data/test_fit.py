"""What a Trainer is handed: over epochs, ranks, stops and resumes."""

import json
import multiprocessing
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from nsa_lightning.data.batch import IGNORE_INDEX, PackedBatch
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sets import MixtureSet
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig

STEPS = 20  # three epochs of the corpus and some


class Recorder(L.LightningModule):
    """Learns nothing and notes the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[PackedBatch] = []
        self.evaluated: list[PackedBatch] = []
        self.steps: list[int] = []

    def training_step(self, batch: PackedBatch) -> torch.Tensor:
        self.batches.append(batch)
        self.steps.append(self.global_step)
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
    assert len(checkpoints) >= 2
    assert len({str(tokens) for tokens in whole}) >= 16


def test_a_resume_with_other_workers_and_a_limited_epoch_sees_the_same(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    options = {"max_steps": STEPS, "limit_train_batches": 4}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=7, save_top_k=-1)
    whole = fit(make_data(num_workers=2), saving, **options).stream
    resumed = fit(make_data(num_workers=1), ckpt=str(tmp_path / "step=7.ckpt"), **options).stream
    assert resumed == whole[7:]
    assert whole == fit(make_data(), max_steps=STEPS).stream


@pytest.mark.slow
@pytest.mark.parametrize("limit", [3, 4, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_a_resumed_run_takes_the_same_steps_whatever_limits_a_pass(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, limit: int | float, accumulate: int
) -> None:
    options = {"limit_train_batches": limit, "accumulate_grad_batches": accumulate, "max_steps": 9, "max_epochs": -1}
    curriculum = {0: 4, 4: 16, 6: 32}

    def run(*saving: L.Callback, ckpt: str | None = None) -> list[tuple[int, int, list[int]]]:
        recorder = fit(make_data(curriculum=curriculum), *saving, ckpt=ckpt, **options)
        return [
            (step, batch.max_seqlen, batch.tokens.tolist())
            for step, batch in zip(recorder.steps, recorder.batches, strict=True)
        ]

    whole = run(ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1))
    for step in range(1, 9):
        resumed = run(ckpt=str(tmp_path / f"step={step}.ckpt"))
        assert resumed == [each for each in whole if each[0] >= step], step
    assert {length for step, length, _ in whole if step >= 6} == {32}


def test_a_run_resumes_on_another_number_of_ranks(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(rank: int, world_size: int, *saving: L.Callback, ckpt: str | None = None, **until: int) -> list[list[int]]:
        replicas = {"rank": rank, "num_replicas": world_size}
        monkeypatch.setattr(L.Trainer, "distributed_sampler_kwargs", replicas)
        return fit(make_data(batch_size=1), *saving, ckpt=ckpt, **until).stream

    alone = run(0, 1, max_epochs=2)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    ranks = [run(0, 3, saving, max_steps=7), run(1, 3, max_steps=7), run(2, 3, max_steps=7)]
    together = [tokens for step in zip(*ranks, strict=True) for tokens in step if any(tokens)]
    assert together == alone[: len(together)]
    for step in range(1, 7):
        checkpoint = str(tmp_path / f"step={step}.ckpt")
        place = min(3 * step, len(alone) // 2) if step < 6 else len(alone) // 2 + 3
        assert run(0, 1, ckpt=checkpoint, max_steps=step + 5) == alone[place : place + 5]
    until = {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}
    assert run(0, 1, ckpt=str(tmp_path / "step=2.ckpt"), **until) == alone[6:]


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


def test_reloading_the_loaders_goes_on_with_the_stream_and_leaves_no_workers(
    make_data: Callable[..., PackedTextDataModule],
) -> None:
    class Workers(L.Callback):
        numbers: ClassVar[list[int]] = []

        def on_train_epoch_end(self, *_: Any) -> None:
            self.numbers.append(len(multiprocessing.active_children()))

    plain = fit(make_data(), max_epochs=4).stream
    data = make_data(num_workers=1)
    reloaded = fit(data, Workers(), max_epochs=4, reload_dataloaders_every_n_epochs=1, enable_checkpointing=False)
    assert reloaded.stream == plain
    assert Workers.numbers == [2] * 4  # one for training, one for validation


def test_a_second_fit_goes_on_with_its_trainer_and_starts_anew_with_another(
    make_data: Callable[..., PackedTextDataModule],
) -> None:
    data, recorder, one = make_data(), Recorder(), trainer(max_epochs=1)
    one.fit(recorder, data)
    one.fit_loop.max_epochs = 2
    one.fit(recorder, data)
    assert recorder.stream == fit(make_data(), max_epochs=2).stream
    assert fit(data, max_steps=5).stream == recorder.stream[:5]


def test_every_held_out_document_is_evaluated_once(make_data: Callable[..., PackedTextDataModule]) -> None:
    data, recorder = make_data(num_workers=1), Recorder()
    for run, split in (("validate", "val"), ("test", "test"), ("predict", "val")):
        recorder.evaluated.clear()
        getattr(trainer(), run)(recorder, data)
        offsets = data.stores[0].split(split).offsets
        stored = data.stores[0].split(split).read(offsets[:-1], np.diff(offsets))
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
    assert batch.target_bytes.sum().item() == data.tokenizer.byte_lengths[scored.numpy()].sum() > 100


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    ten_steps = multiprocessing.get_context("fork").Event()

    class Saving(ModelCheckpoint):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 10:
                ten_steps.set()

    saving = Saving(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 10**6}
    make_data().prepare_data()  # the tokenizer's threads do not survive a fork
    run = multiprocessing.get_context("fork").Process(
        target=fit, args=(make_data(num_workers=1), saving), kwargs=options
    )
    run.start()
    assert ten_steps.wait(60)
    run.kill()
    run.join()
    last = max(tmp_path.glob("checkpoints/step=*.ckpt"), key=step_of)
    whole = fit(make_data(), max_steps=step_of(last) + 9).stream
    assert fit(make_data(num_workers=2), ckpt=str(last), max_steps=step_of(last) + 9).stream == whole[step_of(last) :]
    assert run.exitcode == -signal.SIGKILL


@pytest.fixture
def mixture(make_data: Callable[..., PackedTextDataModule], corpus: Path, tmp_path: Path) -> dict[str, MixtureSet]:
    """Two prepared sets with one tokenizer: most of the corpus and the rest of it."""
    data = [make_data(exclude="0*.txt")]
    data[0].setup("fit")
    path = str(data[0].stores[0].place("tokenizer.json"))
    data.append(make_data(sources=[str(corpus / "0*.txt")], tokenizer=TokenizerConfig(path=path), test_fraction=0.3))
    data[1].setup("fit")
    many, few = (str(each.stores[0].path) for each in data)
    return {"many": MixtureSet(prepared=many, weight=3), "few": MixtureSet(prepared=few, weight=1)}


def test_a_run_goes_on_with_its_set_behind_a_url(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    data = make_data(packing="best_fit")
    saving = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = fit(data, saving, max_steps=STEPS).stream
    remote = make_data(sources=[], prepared=f"file://{data.stores[0].path}", packing="best_fit", num_workers=1)
    assert fit(remote, ckpt=str(tmp_path / "checkpoints" / "step=3.ckpt"), max_steps=STEPS).stream == whole[3:]


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
def test_a_mixture_under_a_curriculum_resumes_exactly(
    make_data: Callable[..., PackedTextDataModule], mixture: dict[str, MixtureSet], tmp_path: Path, packing: str
) -> None:
    def run(ckpt: str | None = None, callback: L.Callback | None = None) -> list[tuple[int, list[int], list[int]]]:
        curriculum = {0: 16, 2: 50, 5: 128}
        sets = dict(reversed(mixture.items())) if ckpt else mixture
        data = make_data(sources=[], mixture=sets, packing=packing, curriculum=curriculum, batch_size=1)
        batches = fit(data, callback, ckpt, max_steps=15, accumulate_grad_batches=3).batches
        return [(batch.max_seqlen, batch.tokens.tolist(), batch.targets.tolist()) for batch in batches]

    saving = ModelCheckpoint(tmp_path / "checkpoints", "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(callback=saving)
    assert [length for length, _, _ in whole[:16]] == [16] * 6 + [50] * 9 + [128]
    lengths = []
    for step in (1, 4, 5, 6, 11):
        resumed = run(str(tmp_path / "checkpoints" / f"step={step}.ckpt"))
        assert resumed == whole[-len(resumed) :], step
        lengths.append(len(resumed))
    assert len(whole) > lengths[0] > lengths[1] > lengths[2] > lengths[3] > lengths[4] > 6


def test_every_held_out_document_of_a_mixture_is_evaluated_once(
    make_data: Callable[..., PackedTextDataModule], mixture: dict[str, MixtureSet]
) -> None:
    data, recorder = make_data(sources=[], mixture=mixture, packing="best_fit"), Recorder()
    trainer().test(recorder, data)
    batches = [torch.bincount(batch.tokens, minlength=300) for batch in recorder.evaluated]
    stored = [store.split("test").read(np.zeros(1, int), store.split("test").offsets[-1:]) for store in data.stores]
    expected = np.bincount(np.concatenate(stored), minlength=300)
    assert (sum(batches).numpy()[1:] == expected[1:]).all()
    assert all(map(len, stored))


def test_padding_and_cut_documents_are_logged_once(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    data, logger = make_data(packing="best_fit", seq_len=64), CSVLogger(tmp_path)
    fit(data, max_epochs=2, logger=logger, reload_dataloaders_every_n_epochs=1)
    lines = Path(logger.log_dir, "metrics.csv").read_text().splitlines()
    (logged,) = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    lengths = np.diff(data.stores[0].split("train").offsets)
    assert int(float(logged["data/cut_documents"])) == (lengths > 64).sum() > 0
    sequences = 64 * data.train_dataloader().num_sequences
    assert float(logged["data/padding_fraction"]) == pytest.approx(1 - lengths.sum() / sequences)
    assert logged["step"] == "0"


TWO_RANKS = """
import sys, json, torch, lightning as L
from pathlib import Path
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sets import MixtureSet
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

class Data(PackedTextDataModule):
    def prepare_data(self):
        super().prepare_data()
        Path(sys.argv[2], f"prepared by {self.trainer.global_rank}").touch()

data = Data(
    sources=[sys.argv[1]], tokenizer=TokenizerConfig(vocab_size=300), seq_len=128, val_fraction=0.2, test_fraction=0.1,
    num_workers=1, cache_dir=sys.argv[2],
)
L.Trainer(
    accelerator="cpu", strategy="ddp_fork", devices=2, max_epochs=2, logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False,
).fit(Recorder(), data)
"""


@pytest.mark.slow
def test_two_processes_share_each_epoch_even_if_lightning_may_put_a_sampler_in(
    make_data: Callable[..., PackedTextDataModule], corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    command = [sys.executable, "-c", TWO_RANKS, str(corpus), str(tmp_path / "two")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert [path.name for path in (tmp_path / "two").glob("prepared*")] == ["prepared by 0"]
    ranks = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    together = [tokens for step in zip(*ranks, strict=True) for tokens in step]
    alone = fit(make_data(batch_size=1), max_epochs=2).stream
    padding = [0] * 128
    assert [tokens for tokens in together if tokens != padding] == alone


def test_a_fit_without_validation_can_be_asked_for(make_data: Callable[..., PackedTextDataModule]) -> None:
    data = make_data(val_fraction=0.0)
    assert fit(data, max_epochs=1).evaluated == []
    with pytest.raises(ValueError, match=r"data.val_fraction=0.0, which leaves no validation document"):
        data.setup("validate")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"seq_len": 64}, "data.seq_len"),
        ({"seed": 1}, "data.seed"),
        ({"exclude": "00.txt"}, "data.sources or data.prepared"),
        ({"packing": "best_fit"}, "data.packing"),
        ({"val_fraction": 0.15}, "data.val_fraction"),
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
    with pytest.raises(ValueError, match=f"{name} must stay as it was to resume"):
        fit(make_data(tokenizer=saved, **change), ckpt=checkpoint, max_steps=4)
    recorder = Recorder()
    trainer().validate(recorder, make_data(tokenizer=saved, **change), ckpt_path=checkpoint, weights_only=True)
    assert recorder.evaluated
