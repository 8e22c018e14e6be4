"""Runs of `nsa fit` in processes of their own, which a test may kill."""

import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVERY_LOSS = """
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  use_distributed_sampler: false
""".strip("\n")
"""Settings of the trainer, in YAML, for a run that logs every loss and does nothing else beside training."""


def start(config, *arguments):
    """`nsa fit` of a config, in the background."""
    command = [sys.executable, "-m", "nsa_cli.main", "fit", "--config", config, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(process):
    """The ranks that a run has started, by their process ids."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in listed if b"nsa_cli" in Path(f"/proc/{child}/cmdline").read_bytes()]


def wait_for(condition, process, *, seconds=90, pause=0.05):
    """Ask until it is so; the run may not end before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(pause)


def losses(folder):
    """Loss of every step that a run logged."""
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}
