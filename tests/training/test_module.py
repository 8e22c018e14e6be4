"""Training through Lightning's Trainer on a small corpus of real files."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from support.training import NSA, data_module, packed_batches, write_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa_lightning.data.batch import IGNORE_INDEX
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.training.callbacks import Continuations, DocumentScores, FitReport, GateMonitor, TokenThroughput
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import WarmupCosine
from nsa_lightning.training.strategy import FSDP2Strategy

CONFIG = TransformerConfig(
    vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, nsa=NSA
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve small source files and a cache beside them."""
    root = tmp_path_factory.mktemp("corpus")
    write_corpus(root)
    return root


def language_model(**changes):
    return LanguageModel(CONFIG, schedule=WarmupCosine(warmup_steps=2), **changes)


class Losses(Callback):
    """Remember every training loss and learning rate."""

    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def trainer(root, *callbacks, **changes):
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "log_every_n_steps": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "callbacks": list(callbacks),
    }
    return Trainer(**(settings | changes))


def fit(root, corpus, max_steps=8, ckpt_path=None, stop_after=None, model=None):
    """Losses, learning rates and final weights of a run that may stop early and write a checkpoint."""
    seed_everything(0)
    losses = Losses()
    checkpoint = ModelCheckpoint(root, filename="stopped", every_n_train_steps=stop_after or 10**6)
    module = model or language_model()

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == stop_after

    run = trainer(root, losses, checkpoint, Stop(), max_steps=max_steps, enable_checkpointing=True, limit_val_batches=0)
    run.fit(module, data_module(corpus), ckpt_path=ckpt_path)
    return losses, {name: value.clone() for name, value in module.state_dict().items()}


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path, corpus):
    whole, whole_weights = fit(tmp_path / "whole", corpus)
    first, _ = fit(tmp_path / "parts", corpus, stop_after=3)
    second, weights = fit(tmp_path / "parts", corpus, ckpt_path=tmp_path / "parts" / "stopped.ckpt")
    assert len(first.losses) == 3
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates
    assert all(torch.equal(weights[name], whole_weights[name]) for name in whole_weights)
    assert len(set(whole.losses)) == len(whole.losses)


def test_the_loss_is_the_mean_over_scored_targets_counted_once(corpus):
    data = data_module(corpus)
    data.prepare_data()
    data.setup("fit")
    module = language_model()
    module.configure_model()
    batch = next(iter(data.val_dataloader()))
    nats, tokens, output = module.summed_loss(batch)
    logits = output.hidden @ module.model.output_embedding.T
    scored = batch.targets != IGNORE_INDEX
    expected = torch.nn.functional.cross_entropy(logits[scored], batch.targets[scored], reduction="sum")
    torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-3)
    assert tokens == scored.sum()
    torch.testing.assert_close(module.predict_step(batch, 0).sum(), expected, rtol=1e-4, atol=1e-3)


def test_a_loss_counts_at_the_position_of_the_token_that_predicts():
    """A document of 258 tokens has 257 predictions, the last of them made at position 256."""
    (batch,) = packed_batches([258], count=1)
    module = language_model()
    module.configure_model()
    module.validation_step(batch, 0)
    assert module.loss_by_position.tokens[:3].tolist() == [256, 1, 0]


def test_training_logs_losses_gates_and_pictures(tmp_path, corpus, capsys):
    logger = TensorBoardLogger(tmp_path, name="run", version="")
    callbacks = [
        GateMonitor(picture_every=2),
        TokenThroughput(window_size=2),
        FitReport(),
        ModelCheckpoint(monitor="val/loss", save_last=True),
    ]
    run = trainer(tmp_path, *callbacks, logger=logger, enable_checkpointing=True, val_check_interval=4, max_steps=8,
                  check_val_every_n_epoch=None)  # fmt: skip
    run.fit(language_model(), data_module(corpus))
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0}).Reload()
    scalars = set(events.Tags()["scalars"])
    branches = ("compressed", "selected", "sliding")
    expected = {"train/loss", "train/grad_norm", "val/loss", "val/perplexity", "val/bits_per_byte"}
    expected |= {
        f"gate_{name}/layer_{layer:02d}/{branch}"
        for name in ("mean", "std", "near_zero", "near_one")
        for layer in range(2)
        for branch in branches
    }
    expected |= {"selection_distance_tokens/layer_00", "train/device/items_per_sec"}
    assert expected <= scalars
    assert [event.step for event in events.Scalars("gate_mean/layer_00/compressed")] == [1, 3, 5, 7]
    assert all(0 < event.value < 1 for event in events.Scalars("gate_mean/layer_01/selected"))
    assert {f"gate/layer_00/{branch}" for branch in branches} <= set(events.Tags()["histograms"])
    counts = sum(events.Histograms("gate/layer_00/selected")[0].histogram_value.bucket)
    assert counts == 2 * 128 * CONFIG.num_heads
    assert [event.step for event in events.Images("gates")] == [1, 5]
    layout = events.Tags()["tensors"]
    assert any("custom_scalars" in tag for tag in layout)
    report = capsys.readouterr().out
    for word in ("bits per byte", "unigram model", "best checkpoint", "tensorboard --logdir"):
        assert word in report


def test_watching_gates_changes_no_loss(tmp_path, corpus):
    plain, _ = fit(tmp_path / "plain", corpus, max_steps=4)
    seed_everything(0)
    losses = Losses()
    logger = TensorBoardLogger(tmp_path, name="watched", version="")
    run = trainer(tmp_path, losses, GateMonitor(every_n_steps=1), logger=logger, max_steps=4, limit_val_batches=0)
    run.fit(language_model(), data_module(corpus))
    assert losses.losses == plain.losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradient_clipping_bounds_the_norm_and_logs_the_norm_before(tmp_path, corpus, precision):
    norms = []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if grads:
                norms.append((torch.nn.utils.get_total_norm(grads).item(), trainer.callback_metrics["train/grad_norm"]))

    run = trainer(tmp_path, Norms(), max_steps=3, gradient_clip_val=0.01, limit_val_batches=0, precision=precision)
    run.fit(language_model(), data_module(corpus))
    assert norms
    for clipped, logged in norms:
        assert clipped == pytest.approx(0.01, rel=1e-3)
        assert logged > 0.1


def test_clipping_of_scaled_gradients_is_refused(corpus):
    module = language_model()
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    optimizer._step_supports_amp_scaling = True
    module.trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=object()))
    with pytest.raises(ValueError, match=r"trainer.gradient_clip_val must be unset .* got 1.0"):
        module.configure_gradient_clipping(optimizer, gradient_clip_val=1.0)


def test_validate_test_and_predict_work_from_a_checkpoint(tmp_path, corpus):
    checkpoint = ModelCheckpoint(tmp_path, filename="model", every_n_train_steps=4)
    run = trainer(tmp_path, checkpoint, max_steps=4, enable_checkpointing=True, limit_val_batches=0)
    run.fit(language_model(), data_module(corpus))
    path = tmp_path / "model.ckpt"
    (validated,) = trainer(tmp_path).validate(language_model(), data_module(corpus), ckpt_path=path)
    (tested,) = trainer(tmp_path).test(language_model(), data_module(corpus), ckpt_path=path)
    names = ("loss", "perplexity", "bits_per_byte", "loss_by_position/0")
    assert set(validated) == {f"val/{name}" for name in names}
    assert set(tested) == {f"test/{name}" for name in names}
    assert validated["val/loss_by_position/0"] == pytest.approx(validated["val/loss"], rel=1e-6)
    assert validated["val/loss"] != tested["test/loss"]
    scores = DocumentScores(str(tmp_path / "scores.jsonl"))
    trainer(tmp_path, scores).predict(language_model(), data_module(corpus), ckpt_path=path, return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    total = sum(row["nats"] for row in rows) / sum(row["tokens"] for row in rows)
    assert total == pytest.approx(validated["val/loss"], rel=1e-4)
    assert all(row["beginning"].startswith("def function_") for row in rows if row["beginning"].startswith("def"))


def test_a_checkpoint_of_other_sizes_is_refused_by_name(tmp_path, corpus):
    checkpoint = ModelCheckpoint(tmp_path, filename="model", every_n_train_steps=1)
    run = trainer(tmp_path, checkpoint, max_steps=1, enable_checkpointing=True, limit_val_batches=0)
    run.fit(language_model(), data_module(corpus))
    wider = LanguageModel(TransformerConfig(**(vars(CONFIG) | {"hidden_size": 48, "head_dim": 8})))
    with pytest.raises(
        ValueError, match=r"ckpt_path must hold a model .* is \(300, 32\) in the checkpoint and \(300, 48\)"
    ):
        trainer(tmp_path).validate(wider, data_module(corpus), ckpt_path=tmp_path / "model.ckpt")


def test_max_steps_is_needed(tmp_path, corpus):
    with pytest.raises(ValueError, match=r"trainer.max_steps must be at least 1 .*, got -1"):
        trainer(tmp_path, max_steps=-1, max_epochs=1).fit(language_model(), data_module(corpus))


def test_a_model_is_rebuilt_from_its_checkpoint_alone(tmp_path, corpus):
    checkpoint = ModelCheckpoint(tmp_path, filename="model", every_n_train_steps=2)
    module = language_model()
    run = trainer(tmp_path, checkpoint, max_steps=2, enable_checkpointing=True, limit_val_batches=0)
    run.fit(module, data_module(corpus))
    loaded = LanguageModel.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.transformer_config == CONFIG
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_continuations_refuse_what_they_cannot_do():
    for name in ("prompt_tokens", "batch_size"):
        with pytest.raises(ValueError, match=rf"generate\.{name} must be at least 1, got 0"):
            Continuations(max_new_tokens=5, **{name: 0})
    trainer = SimpleNamespace(strategy=FSDP2Strategy())
    with pytest.raises(ValueError, match=r"generate\.max_new_tokens must be unset with trainer.strategy=fsdp2"):
        Continuations(max_new_tokens=5).on_predict_start(trainer, LanguageModel(CONFIG))
    Continuations().on_predict_start(trainer, LanguageModel(CONFIG))


class Interrupt(Callback):
    """Fail in the first batch of a prediction."""

    def on_predict_batch_end(self, *_):
        raise RuntimeError("interrupted")


def test_pieces_of_documents_are_continued_once_and_padding_is_not(tmp_path, corpus):
    scores = DocumentScores(str(tmp_path / "scores.jsonl"))
    continuations = Continuations(max_new_tokens=2, prompt_tokens=4, path=str(tmp_path / "continuations.jsonl"))
    data = data_module(corpus)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, scores, continuations, Interrupt()).predict(language_model(), data)
    trainer(tmp_path, scores, continuations).predict(language_model(), data, return_predictions=False)
    scored, continued = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("scores", "continuations")
    )
    batches = list(data.predict_dataloader())
    assert len(scored) == sum((batch.targets[batch.cu_seqlens[:-1]] != IGNORE_INDEX).sum() for batch in batches)
    assert len(continued) == sum(row["tokens"] >= 4 for row in scored) > 0
    assert all(line["prompt"] and line["true"] for line in continued)
    assert any((batch.targets == IGNORE_INDEX).sum() > len(batch.cu_seqlens) for batch in batches)  # there is padding


def test_a_model_trains_on_after_its_continuations(tmp_path, corpus):
    module, data = language_model(), data_module(corpus)
    continuations = Continuations(max_new_tokens=2, prompt_tokens=4, path=str(tmp_path / "continuations.jsonl"))
    trainer(tmp_path, continuations).predict(module, data, return_predictions=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)
    assert not [name for name, value in module.state_dict().items() if torch.equal(value, before[name])]
