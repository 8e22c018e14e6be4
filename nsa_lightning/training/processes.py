"""Processes that something else has started, and those that the trainer counts on."""

import os

from lightning.fabric.plugins.environments import ClusterEnvironment, LightningEnvironment, SLURMEnvironment
from lightning.fabric.plugins.environments import TorchElasticEnvironment as TorchrunEnvironment
from lightning.pytorch import Trainer
from nsa_kernels.errors import SettingError

from nsa_lightning.training.compat import cluster_environment


def check_processes(trainer: Trainer) -> None:
    """Refuse a job whose processes are not those of the trainer's devices: each would train by itself, or wait forever.

    Raises:
        ValueError: the number of processes is another than trainer.devices times trainer.num_nodes.
    """
    environment = cluster_environment(trainer)
    started = _started(environment)
    if started is not None and started != trainer.num_devices * trainer.num_nodes:
        launcher = {TorchrunEnvironment: "torchrun", SLURMEnvironment: "SLURM"}.get(type(environment), "the launcher")
        raise SettingError(
            f"trainer.devices times trainer.num_nodes must be the number of processes that {launcher} starts, "
            f"got {trainer.num_devices} times {trainer.num_nodes} and {started} processes"
        )


def _started(environment: ClusterEnvironment) -> int | None:
    """How many processes the job has; none if the trainer starts them."""
    if not environment.creates_processes_externally:
        return None
    if isinstance(environment, SLURMEnvironment):  # of the step, which may have fewer than the job
        return int(os.environ.get("SLURM_STEP_NUM_TASKS") or environment.world_size())
    if isinstance(environment, LightningEnvironment):  # it knows what the trainer has told it
        size = os.environ.get("WORLD_SIZE")
        return int(size) if size is not None else None
    return environment.world_size()
