"""Processes that a launcher has started are those of the trainer's devices, or nothing begins."""

import pytest
from support.training import make_trainer

from nsa_lightning.training.processes import check_processes

TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "GROUP_RANK": "0"}
SRUN = {
    "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0",
}  # fmt: skip
OTHER = {"WORLD_SIZE": "2", "LOCAL_RANK": "1"}
NAMES = {"TORCHELASTIC_RUN_ID": "torchrun", "SLURM_JOB_NAME": "SLURM", "WORLD_SIZE": "the launcher"}


@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, OTHER], ids=["torchrun", "srun", "other"])
def test_more_processes_than_devices_are_refused_by_name(tmp_path, monkeypatch, environment, strategy):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    launcher = next(name for variable, name in NAMES.items() if variable in environment)
    message = f"trainer.devices times .* must be .* that {launcher} starts, got 1 times 1 and 2 processes"
    with pytest.raises(ValueError, match=message):
        check_processes(make_trainer(tmp_path, strategy=strategy))
    with pytest.raises(ValueError, match=r"got 2 times 2 and 2 processes"):
        check_processes(make_trainer(tmp_path, strategy="ddp", devices=2, num_nodes=2))
    check_processes(make_trainer(tmp_path, strategy="ddp", devices=2))


def test_processes_that_the_trainer_starts_itself_are_not_counted(tmp_path, monkeypatch):
    check_processes(make_trainer(tmp_path))
    check_processes(make_trainer(tmp_path, strategy="ddp", devices=2))
    monkeypatch.setenv("WORLD_SIZE", "8")  # of nodes, as some platforms have it
    check_processes(make_trainer(tmp_path))


def test_a_step_of_a_larger_slurm_job_counts_its_own_processes(tmp_path, monkeypatch):
    for name, value in (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    check_processes(make_trainer(tmp_path))
