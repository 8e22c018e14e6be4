"""Ranks that share a batch compute together what one process does alone."""

import json

import pytest
import torch
from support.dense import write_source
from support.same_run import assert_same_run
from support.training import data_module, fit, language_model, make_trainer, run_job, write_uneven_corpus

from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.training.strategy import FSDP2Strategy

STEPS = 3
LENGTHS = [37, 1, 62, 5, 81]  # 186 tokens: two ranks part in the middle of the third document
MIXED = {"num_layers": 3, "attention": ["nsa", "full", "sliding"], "sliding_window": 20, "num_kv_heads": 2}
SHARED = {"num_kv_heads": 2, "nsa": {"kv_sharing": "shared", "compression": "linear"}}
RUNS = {
    "mixed": {"lengths": LENGTHS, "model": {"transformer": MIXED}},
    "shared": {"lengths": LENGTHS, "model": {"transformer": SHARED, "activation_checkpointing": "selective"}},
    "recomputed": {"lengths": LENGTHS, "model": {"transformer": MIXED, "activation_checkpointing": "block"}},
    "corpus": {
        "data": {"seq_len": 254, "batch_size": 1, "val_fraction": 0.5},
        "model": {"transformer": MIXED},
        "limit_val_batches": 1.0,
        "val_check_interval": STEPS,
    },
}
UNEVEN = {"packing": "best_fit", "val_fraction": 0, "test_fraction": 0}
SETTINGS = {"max_steps": STEPS, "max_epochs": -1}


@pytest.fixture(scope="module")
def alone(folder):
    """The runs in this process, by name; the last is saved on its way."""
    saved = {"scores": True, "save_after": 1, "save": str(folder / "alone.ckpt")}
    runs = RUNS | {"corpus": RUNS["corpus"] | saved}
    return {name: fit(folder / "alone", folder / "corpus", **SETTINGS, **run) for name, run in runs.items()}


def job(folder, ranks, **runs):
    common = {
        "strategy": "context_parallel",
        "corpus": str(folder / "corpus"),
        "root": str(folder / "together"),
    } | SETTINGS
    return dict(zip(runs, run_job(folder, *(common | run for run in runs.values()), ranks=ranks), strict=True))


def distilled(teacher):
    """A run with a teacher made for fewer tokens than the longest document has."""
    return RUNS["mixed"] | {"model": {"transformer": MIXED, "distillation": {"teacher": teacher}}}


@pytest.fixture(scope="module")
def together(folder, alone):
    """The runs of two ranks that share every batch."""
    saved = {"scores": True, "save_after": 1, "save": str(folder / "together.ckpt")}
    (folder / "uneven").mkdir()
    write_uneven_corpus(folder / "uneven")
    others = {
        "corpus": RUNS["corpus"] | saved,
        "resumed": RUNS["corpus"] | {"resume": str(folder / "alone.ckpt")},
        "bf16": RUNS["mixed"] | {"precision": "bf16-mixed"},
        "accumulating": {"data": UNEVEN | {"batch_size": 1}, "model": {"transformer": MIXED},
                         "corpus": str(folder / "uneven"), "accumulate_grad_batches": 2},
        "distilled": distilled(str(write_source(folder / "teacher", max_position_embeddings=70))),
    }  # fmt: skip
    return job(folder, 2, **(RUNS | others))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_ranks_that_share_batches_train_as_one(together, alone, name):
    assert_same_run(together[name], alone[name])
    summaries = [value for key, value in alone[name]["gradients"].items() if "_summary.in_weight" in key]
    assert all((gradient.abs().amax((1, 2)) > 1e-7).all() for gradient in summaries)  # of every KV head
    assert summaries
    assert alone[name]["norms"][0] > 0.5  # the norm at which the test's trainer clips


@pytest.mark.slow
def test_ranks_that_share_batches_take_the_mean_over_all_tokens_of_a_step(together, folder):
    data = {"data": UNEVEN | {"batch_size": 2}, "model": {"transformer": MIXED}}
    assert_same_run(together["accumulating"], fit(folder, folder / "uneven", **SETTINGS, **data))


@pytest.mark.slow
def test_ranks_that_share_batches_learn_from_a_teacher_as_one(together, folder):
    alone = fit(folder, folder / "corpus", **SETTINGS, **distilled(str(folder / "teacher")))
    assert_same_run(together["distilled"], alone)
    assert together["distilled"]["divergences"] == pytest.approx(alone["divergences"], rel=1e-5)
    assert len(alone["divergences"]) == STEPS


@pytest.mark.slow
def test_shared_batches_train_in_bf16(together, alone):
    assert together["bf16"]["losses"] == pytest.approx(alone["mixed"]["losses"], rel=0.02)
    assert together["bf16"]["losses"] != pytest.approx(alone["mixed"]["losses"], rel=1e-5)


@pytest.mark.slow
def test_validation_and_document_scores_count_every_token_once(together, alone, folder):
    assert together["corpus"]["metrics"] == pytest.approx(alone["corpus"]["metrics"], rel=1e-5)
    names = ("loss", "perplexity", "bits_per_byte", "loss_by_position/0")
    assert set(alone["corpus"]["metrics"]) == {f"val/{name}" for name in names}
    expected = [json.loads(line) for line in (folder / "alone" / "document_scores.jsonl").read_text().splitlines()]
    actual = [
        json.loads(line) for line in (folder / "together" / "document_scores.rank0.jsonl").read_text().splitlines()
    ]
    for line, like in zip(actual, expected, strict=True):
        assert line["nats"] == pytest.approx(like["nats"], rel=1e-5)
        assert {**line, "nats": 0, "bits_per_byte": 0} == {**like, "nats": 0, "bits_per_byte": 0}
    assert len(expected) > 3
    assert not (folder / "together" / "document_scores.rank1.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed", "shared"])
def test_gates_blocks_tokens_and_flops_add_up_over_ranks(together, alone, name):
    assert together[name]["counts"] == alone[name]["counts"]
    assert alone[name]["counts"][0] == sum(LENGTHS)
    assert alone[name]["counts"][1] > 0
    assert together[name]["statistics"].keys() == alone[name]["statistics"].keys()
    for layer, sums in alone[name]["statistics"].items():
        torch.testing.assert_close(together[name]["statistics"][layer], sums, rtol=1e-4, atol=0)
        assert sums[-1] == sum(LENGTHS)
        assert sums[-2] > 0  # some block beyond the window was chosen freely


@pytest.mark.slow
def test_checkpoints_do_not_depend_on_who_shares_batches(together, alone, folder):
    assert_same_run(together["resumed"], alone["corpus"], steps=STEPS - 1)
    resumed = fit(folder, folder / "corpus", **SETTINGS, **RUNS["corpus"], resume=str(folder / "together.ckpt"))
    assert_same_run(resumed, alone["corpus"], steps=STEPS - 1)


@pytest.mark.slow
def test_groups_of_ranks_that_share_batches_read_different_ones(folder, alone):
    expected = fit(folder, folder / "corpus", **SETTINGS, model=RUNS["mixed"]["model"])
    pairs = job(folder, 4, pairs={"data": {"batch_size": 1}, "model": RUNS["mixed"]["model"]})["pairs"]
    assert_same_run(pairs, expected, tolerance=1e-3)  # small gradients, which Adam makes much of


@pytest.mark.parametrize(
    ("ranks", "size", "seq_len", "rule"),
    [
        (2, 2, 128, r"must divide the number of ranks and num_kv_heads, got 2, 2 and 1; at most 1 does"),
        (6, 4, 128, r"must divide the number of ranks and num_kv_heads, got 4, 6 and 8; at most 2 does"),
        (
            4,
            4,
            126,
            r"data.seq_len times data.batch_size must be a multiple of context_parallel_size, got 126, 1 and 4",
        ),
        (1, 0, 128, r"context_parallel_size must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused_before_anything_starts(
    folder, monkeypatch, ranks, size, seq_len, rule
):
    monkeypatch.setenv("LOCAL_RANK", "0")  # as one of several processes that something else has started
    module = language_model({"num_kv_heads": 1 if ranks == 2 else 8, "num_heads": 8})
    data = data_module(folder / "nothing", seq_len=seq_len, batch_size=1)
    with pytest.raises(ValueError, match=rule):
        make_trainer(folder, strategy=FSDP2Strategy(context_parallel_size=size), devices=ranks).fit(module, data)


def test_tokens_of_other_data_are_not_dropped_silently():
    with pytest.raises(ValueError, match=r"must be multiples of context_parallel_size, got 5 and 2"):
        ContextParallel(size=2).share(torch.arange(5))
