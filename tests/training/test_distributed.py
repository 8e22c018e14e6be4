"""Two processes compute what one does, with every strategy, and read each other's checkpoints."""

import pytest
import torch
from support.dense import write_source
from support.same_run import assert_same_run
from support.training import fit, run_job, write_uneven_corpus
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore

from nsa_lightning.checkpoint.sharded import read_whole
from nsa_lightning.model.attention.registry import is_new_part
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.sharding import shard_transformer

FIRST, ALL = 3, 5  # steps before the checkpoint, and in all
UNEVEN = {"packing": "best_fit", "val_fraction": 0, "test_fraction": 0}
SCHEDULED = {"max_steps": ALL, "max_epochs": -1}
FROZEN = {"new_parts": {"freeze_others_steps": FIRST + 1, "lr_factor": 3.0}}  # the last step trains everything


@pytest.fixture(scope="module")
def single(folder):
    """The whole run in this process, saved on its way."""
    return fit(folder / "single", folder / "corpus", **SCHEDULED, save_after=FIRST, save=str(folder / "single.ckpt"))


@pytest.fixture(scope="module")
def uneven_alone(folder):
    """Steps over four sequences of uneven numbers of tokens, of which a pass has five."""
    (folder / "uneven").mkdir()
    write_uneven_corpus(folder / "uneven")
    return fit(folder / "acc", folder / "uneven", **SCHEDULED, data=UNEVEN | {"batch_size": 4})


@pytest.fixture(scope="module")
def jobs(folder, single, uneven_alone):
    """Runs of two processes, by name: one sequence a rank where the single process has two."""
    common = {"corpus": str(folder / "corpus"), "root": str(folder / "two"), "data": {"batch_size": 1}} | SCHEDULED
    first = {"save_after": FIRST}
    uneven = {"corpus": str(folder / "uneven"), "data": UNEVEN | {"batch_size": 1}}
    distilled = {"model": {"distillation": {"teacher": str(write_source(folder / "teacher")), "weight": 2.0}}}
    runs = {
        "ddp": {"strategy": "ddp", "save": str(folder / "ddp.ckpt")} | first,
        "fsdp2": {"strategy": "fsdp2", "save": str(folder / "sharded.ckpt")} | first,
        "one file": {"strategy": "fsdp2_one_file", "save": str(folder / "gathered.ckpt")} | first,
        "async": {"strategy": "fsdp2_async", "save": str(folder / "async.ckpt")} | first,
        "offload": {"strategy": "fsdp2_offload", "model": {"activation_checkpointing": "block"}},
        "selective": {"strategy": "fsdp2", "model": {"activation_checkpointing": "selective"}},
        "validating": {"strategy": "fsdp2", "limit_val_batches": 1.0, "val_check_interval": 2, "save_after": 4,
                       "save": str(folder / "validated.ckpt")},
        "accumulating ddp": {"strategy": "ddp", "accumulate_grad_batches": 2} | uneven,
        "accumulating": {"strategy": "fsdp2", "accumulate_grad_batches": 2} | uneven,
        "reducing": {"strategy": "fsdp2_reducing", "accumulate_grad_batches": 2} | uneven,
        "offload accumulating": {"strategy": "fsdp2_offload", "accumulate_grad_batches": 2} | uneven,
        "bf16": {"strategy": "fsdp2", "precision": "bf16-mixed"},
        "poisoned ddp": {"strategy": "ddp", "poison": 2},
        "poisoned fsdp2": {"strategy": "fsdp2", "poison": 2},
        "sharded to ddp": {"strategy": "ddp", "resume": str(folder / "sharded.ckpt")},
        "sharded to fsdp2": {"strategy": "fsdp2", "resume": str(folder / "sharded.ckpt")},
        "single to fsdp2": {"strategy": "fsdp2", "resume": str(folder / "single.ckpt")},
        "frozen ddp": {"strategy": "ddp", "model": FROZEN},
        "frozen fsdp2": {"strategy": "fsdp2", "model": FROZEN, "save": str(folder / "frozen.ckpt")} | first,
        "frozen resumed": {"strategy": "fsdp2", "model": FROZEN, "resume": str(folder / "frozen.ckpt")},
        "distilled ddp": {"strategy": "ddp"} | distilled,
        "distilled fsdp2": {"strategy": "fsdp2"} | distilled,
        "distilled bf16": {"strategy": "fsdp2", "precision": "bf16-mixed"} | distilled,
    }  # fmt: skip
    return dict(zip(runs, run_job(folder, *(common | run for run in runs.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "one file", "async", "offload", "selective", "validating"])
def test_two_ranks_train_as_one(jobs, single, name):
    assert_same_run(jobs[name], single)
    assert single["norms"][0] > 0.5  # the norm at which the test's trainer clips


@pytest.mark.slow
def test_validation_in_a_sharded_run_scores_every_token_once(jobs, folder):
    expected = fit(folder / "val", folder / "corpus", **SCHEDULED, limit_val_batches=1.0, val_check_interval=2)
    assert jobs["validating"]["metrics"] == pytest.approx(expected["metrics"], rel=1e-4)
    by_position = {"val/loss_by_position/0"}  # documents are shorter than the first bucket
    assert set(expected["metrics"]) == {"val/loss", "val/perplexity", "val/bits_per_byte"} | by_position


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accumulating ddp", "accumulating", "reducing", "offload accumulating"])
def test_a_step_over_several_batches_of_two_ranks_is_the_mean_over_all_their_tokens(jobs, uneven_alone, name):
    """Of one batch in one process; each pass ends with a step of fewer, one of them all padding."""
    assert_same_run(jobs[name], uneven_alone)


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_keeps_float32_weights(jobs, single):
    weights = jobs["bf16"]["weights"]
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert any((value != value.bfloat16()).any() for value in weights.values())
    assert jobs["bf16"]["losses"] == pytest.approx(single["losses"], rel=0.02)
    assert jobs["bf16"]["losses"] != pytest.approx(single["losses"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["poisoned ddp", "poisoned fsdp2"])
def test_all_ranks_leave_out_the_step_that_one_rank_spoils(jobs, folder, single, name):
    expected = fit(folder / "poisoned", folder / "corpus", **SCHEDULED, poison=2)
    for key, value in expected["weights"].items():  # Adam makes much of the rounding of a gradient near 0
        torch.testing.assert_close(jobs[name]["weights"][key], value, rtol=0, atol=1e-3 * float(value.abs().max()))
    assert jobs[name]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert expected["losses"][:3] == single["losses"][:3]
    assert expected["losses"][3:] != single["losses"][3:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded to ddp", "sharded to fsdp2", "single to fsdp2"])
def test_two_ranks_go_on_from_any_checkpoint(jobs, single, name):
    assert_same_run(jobs[name], single, steps=ALL - FIRST)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "sharded", "gathered", "async"])
def test_one_process_goes_on_from_a_checkpoint_of_two(jobs, single, folder, name):
    resumed = fit(folder / "resumed", folder / "corpus", **SCHEDULED, resume=str(folder / f"{name}.ckpt"))
    assert_same_run(resumed, single, steps=ALL - FIRST)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [("frozen ddp", ALL), ("frozen fsdp2", ALL), ("frozen resumed", ALL - FIRST)]
)
def test_two_ranks_train_new_parts_alone_and_go_on_in_the_middle_of_it(jobs, folder, single, name, steps):
    expected = fit(folder / "frozen", folder / "corpus", **SCHEDULED, model=FROZEN)
    assert_same_run(jobs[name], expected, steps=steps, tolerance=2e-3)  # small gradients, which Adam makes much of
    assert expected["norms"][0] < 0.5 * single["norms"][0]  # of the gates and summaries alone
    assert expected["norms"][-1] > 0.5 * single["norms"][-1]


@pytest.mark.slow
def test_a_sharded_checkpoint_has_moments_of_trained_parts_alone(jobs, single, folder):
    checkpoint = read_whole(folder / "frozen.ckpt")
    (state,) = checkpoint["optimizer_states"]
    new = [name for name in checkpoint["state_dict"] if is_new_part(name)]
    assert len(state["state"]) == len(new) > 0
    assert all(entry["step"] == FIRST for entry in state["state"].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distilled ddp", "distilled fsdp2"])
def test_two_ranks_learn_from_a_teacher_as_one(jobs, single, folder, name):
    distillation = {"teacher": str(folder / "teacher"), "weight": 2.0}
    expected = fit(folder / "distilled", folder / "corpus", **SCHEDULED, model={"distillation": distillation})
    assert_same_run(jobs[name], expected)
    assert jobs[name]["divergences"] == pytest.approx(expected["divergences"], rel=1e-5)
    assert jobs["distilled bf16"]["divergences"] == pytest.approx(expected["divergences"], rel=0.02)
    assert expected["losses"][0] == single["losses"][0]
    assert expected["losses"][-1] != pytest.approx(single["losses"][-1], rel=1e-4)


def test_seventy_billion_weights_are_built_without_memory_and_shared_evenly():
    """Over 64 ranks, of which this process plays one; the block summaries have 8 KV heads to share."""
    distributed.init_process_group("fake", rank=0, world_size=64, store=FakeStore())
    try:
        with torch.device("meta"):
            model = Transformer(
                TransformerConfig(
                    vocab_size=128256,
                    hidden_size=8192,
                    num_layers=80,
                    num_heads=64,
                    num_kv_heads=8,
                    intermediate_size=28672,
                    tie_embeddings=False,
                )
            )
        mesh = init_device_mesh("cpu", (64,))
        shard_transformer(model, mesh, MixedPrecisionPolicy(param_dtype=torch.bfloat16), OffloadPolicy())
        parameters = list(model.parameters())
        assert all(p.is_meta for p in parameters)
        assert sum(p.to_local().numel() for p in parameters) < 1.002 * sum(p.numel() for p in parameters) / 64
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_saved_after_validation_resumes(jobs, single, folder):
    """After a validation the root's weights are still gathered."""
    resumed = fit(folder / "resumed", folder / "corpus", **SCHEDULED, resume=str(folder / "validated.ckpt"))
    assert_same_run(resumed, single, steps=1)
