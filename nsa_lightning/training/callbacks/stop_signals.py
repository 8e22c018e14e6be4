"""SIGTERM and Ctrl-C: noted when they come, acted on between two steps by all ranks together."""

import atexit
import multiprocessing
import signal
import threading
from types import FrameType

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

from nsa_lightning.training.compat import cluster_environment


class StopRequested(SIGTERMException):
    """The run was told to stop and has saved its last step; `code` is the exit status that says so."""

    def __init__(self, trainer: Trainer, signum: int) -> None:
        environment = cluster_environment(trainer)
        started_by_rank_0 = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        super().__init__(0 if started_by_rank_0 else 128 + signum)  # Lightning kills rank 0 where one of those fails


class StopSignals:
    """Takes the place of Lightning's handler, which talks to the other ranks in the middle of whatever they do.

    SIGTERM is blocked as well: processes that make batches inherit that. Schedulers send it to them too, and the step
    could not be finished if they ended.
    """

    def __init__(self) -> None:
        self._received = 0
        self._group: distributed.ProcessGroup | None = None

    def install(self) -> None:
        """Note the signals from now on, on every rank; Lightning puts the previous handlers back when the run ends."""
        if distributed.is_initialized() and self._group is None:
            self._group = distributed.new_group(backend="gloo")  # on the host: no wait for the device
        self._received = 0
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signum, self._note)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            atexit.unregister(_abandon_workers)
            atexit.register(_abandon_workers)

    def release(self) -> None:
        """Let SIGTERM through again; before the previous handlers are back, for one may be waiting."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == self._received == signal.SIGINT:  # the second Ctrl-C does not wait
            raise KeyboardInterrupt
        self._received = signum

    def agreed(self) -> int:
        """The signal that some rank has received, the same on every rank; 0 for none."""
        if signal.SIGTERM in signal.sigpending():
            self._received = signal.SIGTERM
        if self._group is None:
            return self._received
        received = torch.tensor(self._received)
        distributed.all_reduce(received, distributed.ReduceOp.MAX, group=self._group)
        return int(received)


def _abandon_workers() -> None:
    """End the processes that make batches: they are deaf to SIGTERM, and Python would wait for them at its exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
    for process in multiprocessing.active_children():
        process.kill()
