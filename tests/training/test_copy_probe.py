"""The copying probe scores what a document repeats, and nothing else."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from support.training import CONFIG, data_module, language_model, write_corpus

from nsa_lightning.data.batch import IGNORE_INDEX
from nsa_lightning.training.callbacks import CopyProbe


def probe_of(tmp_path, **settings):
    """A probe that was set up for 128 tokens a sequence, its trainer and its module."""
    write_corpus(tmp_path)
    module = language_model({"max_seq_len": 128})
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = data_module(tmp_path)
    data.prepare_data()
    data.setup("fit")
    trainer.datamodule = data
    probe = CopyProbe(**settings)
    probe.setup(trainer, module, "fit")
    return probe, trainer, module


def test_every_piece_is_repeated_and_scored_from_its_second_token_on(tmp_path):
    probe, _, _ = probe_of(tmp_path, lengths=[8, 32], num_documents=3)
    assert sorted(length for length, _, _ in probe._scored) == [8, 8, 8, 32, 32, 32]
    for length, index, place in probe._scored:
        batch, start = probe._batches[index], place.start - length
        assert len(batch.tokens) == 128
        assert torch.equal(batch.tokens[start : start + length], batch.tokens[start + length : start + 2 * length])
        assert torch.equal(batch.targets[place], batch.tokens[start + 1 : start + length])
        assert {start, start + 2 * length} <= set(batch.cu_seqlens.tolist())
        assert not (batch.targets[place] == IGNORE_INDEX).any()


def test_tokens_are_drawn_from_those_that_training_sees(tmp_path):
    probe, trainer, _ = probe_of(tmp_path)
    counts = trainer.datamodule.stores[0].token_counts("train")
    drawn = torch.cat([batch.tokens for batch in probe._batches]).unique()
    assert (torch.from_numpy(counts)[drawn] > 0).all()
    assert trainer.datamodule.tokenizer.end_of_text_id not in drawn


def test_the_logged_loss_is_that_of_the_repeated_tokens_alone(tmp_path):
    probe, trainer, module = probe_of(tmp_path, lengths=[8, 32], num_documents=2)
    logged = {}
    module.log = lambda name, value: logged.update({name: value.item()})

    def predict_step(batch, index):  # the loss of a token is its position
        return batch.positions.float()

    module.predict_step = predict_step
    probe.on_validation_epoch_end(trainer, module)
    assert logged == {"val/copying/8": 11.0, "val/copying/32": 47.0}  # positions 8 to 14 and 32 to 62


def test_a_model_that_learned_nothing_is_at_the_level_of_chance(tmp_path):
    write_corpus(tmp_path)
    module = language_model({"max_seq_len": 128})
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_steps=1, limit_val_batches=1, callbacks=[CopyProbe()],
    )  # fmt: skip
    metrics = trainer.validate(module, data_module(tmp_path), verbose=False)[0]
    assert metrics["val/copying/64"] == pytest.approx(math.log(CONFIG.vocab_size), rel=0.3)


@pytest.mark.parametrize("lengths", [[], [1], [65]])
def test_lengths_that_cannot_be_repeated_are_refused(tmp_path, lengths):
    with pytest.raises(ValueError, match=r"copy_probe\.lengths must be"):
        probe_of(tmp_path, lengths=lengths)


def test_a_sequence_too_short_for_the_usual_lengths_is_named(tmp_path):
    module = language_model({"max_seq_len": 100})
    with pytest.raises(ValueError, match=r"copy_probe\.lengths must be given"):
        CopyProbe().setup(Trainer(accelerator="cpu", logger=False), module, "fit")
