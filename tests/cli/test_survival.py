"""Runs that are killed and told to stop, with the command as a user types it, sharded over two processes."""

import os
import signal
from pathlib import Path

import pytest
import torch
from support.command_line import run
from support.runs import EVERY_LOSS, TELLS_SAVES, children, losses, start, wait_until_saved

STEPS = 150

CONFIG = f"""
trainer:
  accelerator: cpu
  devices: 1
  max_steps: {STEPS}
{EVERY_LOSS}
  logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: runs, name: small}}}}
model:
  transformer:
    hidden_size: 16
    num_layers: 1
    num_heads: 2
    num_kv_heads: 1
    intermediate_size: 16
    nsa: {{compress_block_size: 8, compress_stride: 4, select_block_size: 8, num_selected_blocks: 4, window_size: 8}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3, fused: true}}}}
checkpoint: {{last_every_n_steps: 5, monitor: null, save_top_k: 0}}
gate_monitor: {{every_n_steps: 1000000}}
data:
  sources: [texts]
  tokenizer: {{vocab_size: 300}}
  seq_len: 64
  val_fraction: 0
  num_workers: 0
"""
TWO = ["--trainer.strategy", "fsdp2", "--trainer.devices", "2", "--data.batch_size", "1", "--ckpt_path", "last"]


@pytest.fixture
def workplace(workplace):
    """The usual one, with another config."""
    (workplace / "small.yaml").write_text(CONFIG)
    return workplace


@pytest.mark.slow
def test_a_run_killed_and_stopped_ends_with_the_losses_of_one_that_was_not(workplace, monkeypatch):
    first = start("small.yaml", *TWO, *TELLS_SAVES)
    assert "starting anew" in wait_until_saved(first)
    os.kill(children(first)[0], signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode != 0

    second = start("small.yaml", *TWO, *TELLS_SAVES)
    assert "Restored all states" in wait_until_saved(second)
    os.kill(children(second)[0], signal.SIGTERM)  # the scheduler tells any one of the processes
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 143, output[-3000:]

    sharded = "runs/small/version_1/checkpoints/last.ckpt"
    assert run(monkeypatch, "consolidate", "--checkpoint", sharded, "--output", "whole.ckpt") == 0
    stopped = torch.load("whole.ckpt", weights_only=True)["global_step"]
    Path("whole.ckpt").replace("runs/small/version_1/checkpoints/whole.ckpt")  # now the newest: one file
    one = ("fit", "--config", "small.yaml", "--data.batch_size", "2")
    assert run(monkeypatch, *one, "--ckpt_path", "last") == 0
    assert run(monkeypatch, *one, "--trainer.logger.name", "whole") == 0

    parts = [losses(folder) for folder in sorted((workplace / "runs/small").iterdir())]
    whole = losses(workplace / "runs/whole/version_0")
    assert len(parts) == 3
    assert min(parts[1]) > 0
    assert min(parts[2]) == stopped < STEPS
    for part in parts:
        assert {step: whole[step] for step in part} == pytest.approx(part, rel=1e-3)
    assert len(whole) == STEPS
