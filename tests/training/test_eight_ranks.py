"""Eight processes compute what one does, and four and one go on from their checkpoint."""

import pytest
from support.same_run import assert_same_run
from support.training import fit, run_job

FIRST, ALL = 1, 3  # steps before the checkpoint, and in all
SETTINGS = {
    "max_steps": ALL,
    "max_epochs": -1,
    "model": {"transformer": {"num_heads": 16, "num_kv_heads": 8, "head_dim": 8}},
}


@pytest.fixture(scope="module")
def eight(folder):
    """Runs by the number of ranks that share a sequence; one is saved on its way."""
    runs = {
        1: {"strategy": "fsdp2", "save_after": FIRST, "save": str(folder / "eight.ckpt")},
        4: {"strategy": "context_parallel_4"},
        8: {"strategy": "context_parallel_8"},
    }
    common = {"corpus": str(folder / "corpus"), "root": str(folder / "eight"), "data": {"batch_size": 1}} | SETTINGS
    return dict(zip(runs, run_job(folder, *(common | run for run in runs.values()), ranks=8, timeout=300), strict=True))


def alone(folder, batch_size, **settings):
    return fit(folder / "alone", folder / "corpus", data={"batch_size": batch_size}, **SETTINGS, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", [1, 4, 8])
def test_eight_ranks_train_as_one(eight, folder, sharing):
    """Each with a sequence of its own, four to a sequence, and all on one."""
    assert_same_run(eight[sharing], alone(folder, 8 // sharing), tolerance=1e-3)  # of small gradients Adam makes much


@pytest.mark.slow
def test_four_ranks_and_one_go_on_from_a_checkpoint_of_eight(eight, folder):
    checkpoint = {"resume": str(folder / "eight.ckpt")}
    run = {
        "strategy": "fsdp2",
        "corpus": str(folder / "corpus"),
        "root": str(folder / "four"),
        "data": {"batch_size": 2},
    }
    (four,) = run_job(folder, run | checkpoint | SETTINGS, ranks=4)
    for resumed in (four, alone(folder, 8, **checkpoint)):
        assert_same_run(resumed, eight[1], steps=ALL - FIRST)
