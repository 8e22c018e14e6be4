"""Runs of `nsa fit` in processes of their own, which a test may kill."""

import os
import subprocess
import sys
import time
from pathlib import Path

from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVERY_LOSS = """
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  use_distributed_sampler: false
""".strip("\n")
"""Settings of the trainer, in YAML, for a run that logs every loss and does nothing else beside training."""


TELLS_SAVES = ("--trainer.callbacks+", "support.runs.TellSave")
"""Flags of a run that `wait_until_saved` waits for."""

_SAVED = "a checkpoint is there"


class TellSave(Callback):
    """Says on stdout that there is a checkpoint to go on from, as the next step begins."""

    def __init__(self) -> None:
        self.told = False

    def on_train_batch_start(self, trainer, *_):
        last = trainer.checkpoint_callback.last_model_path
        if last and not self.told and trainer.is_global_zero:
            self.told = True
            print(_SAVED, flush=True)


def start(config, *arguments, stderr=subprocess.STDOUT):
    """`nsa fit` of a config, in the background, in a session of its own."""
    command = [sys.executable, "-m", "nsa_cli.main", "fit", "--config", config, *arguments]
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip


def wait_until_saved(process):
    """What the run prints until its first checkpoint is written; it may not end before."""
    printed = []
    for line in process.stdout:
        printed.append(line)
        if _SAVED in line:
            return "".join(printed)
    raise AssertionError("".join(printed)[-3000:])


def children(process):
    """The ranks that a run has started, by their process ids."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in listed if b"nsa_cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, process, *, seconds=90, pause=0.05):
    """Ask until it is so, of what no run can tell itself, such as a save that is under way; it may not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(pause)


def losses(folder):
    """Loss of every step that a run logged."""
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}
