"""The `nsa` command in this process, on a model and texts so small that a run takes a second."""

import sys
from uuid import uuid4

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger
from nsa_cli.main import main

SMALL = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 3
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 1
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
model:
  transformer:
    hidden_size: 16
    num_layers: 1
    num_heads: 2
    num_kv_heads: 1
    intermediate_size: 16
    nsa: {compress_block_size: 8, compress_stride: 4, select_block_size: 8, num_selected_blocks: 4, window_size: 8}
data:
  tokenizer: {vocab_size: 300}
  seq_len: 64
  val_fraction: 0.2
  num_workers: 0
"""

LOGGED = ("--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "runs")


def run(monkeypatch, *arguments):
    """Exit status of `nsa *arguments`."""
    monkeypatch.setattr(sys, "argv", ["nsa", *map(str, arguments)])
    try:
        return main()
    except SystemExit as stop:
        return stop.code


def run_small(monkeypatch, command, *arguments):
    return run(monkeypatch, command, "--config", "small.yaml", "--data.sources", '["texts"]', *arguments)


class ProjectLogger(Logger):
    """Keeps runs as W&B does: a directory a project, and in it one for each run under an id that nobody chose."""

    def __init__(self, save_dir: str, project: str | None = None, name: str | None = None) -> None:
        super().__init__()
        self._save_dir, self._project, self.run_name, self._id = save_dir, project, name, uuid4().hex[:8]

    @property
    def save_dir(self) -> str:
        return self._save_dir

    @property
    def name(self) -> str:
        return self._project or "unnamed"

    @property
    def version(self) -> str:
        return self._id

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class FailingCallback(Callback):
    """A callback of the user's."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_fit_start(self, trainer, pl_module):
        if self.kind == "zip":
            list(zip([1], [1, 2], strict=True))
        if self.kind == "misconfiguration":
            raise MisconfigurationException("a callback's own")
        pl_module.log("train/loss", 1.0)  # not allowed here
