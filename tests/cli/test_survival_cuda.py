"""A run on two GPUs loses a rank in training and in the middle of a save, and ends as one that did not."""

import os
import signal

import pytest
import torch
from support.runs import EVERY_LOSS, children, losses, start, wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]  # four starts, each of which compiles kernels and blocks

STEPS = 60
CONFIG = f"""
trainer:
  accelerator: gpu
  devices: 2
  strategy: fsdp2
  precision: bf16-mixed
  max_steps: {STEPS}
{EVERY_LOSS}
  logger: {{class_path: TensorBoardLogger, init_args: {{save_dir: runs, name: killed}}}}
model:
  compile: false
  transformer: {{hidden_size: 1024, num_layers: 12, num_heads: 16, num_kv_heads: 1}}
checkpoint: {{last_every_n_steps: 10, monitor: null, save_top_k: 0}}
data:
  sources: ["{{stdlib}}/json/*.py", "{{stdlib}}/email/*.py"]
  tokenizer: {{vocab_size: 1000}}
  seq_len: 4096
  val_fraction: 0
  num_workers: 0
"""
"""A checkpoint has 2 GB, which takes long enough to write for a test to meddle with it."""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_killed_in_training_and_during_a_save(tmp_path, monkeypatch):
    """The losses of all that is left are those of an undisturbed run, step by step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "config.yaml").write_text(CONFIG)

    first = start("config.yaml", "--ckpt_path", "last")
    wait_for((tmp_path / "runs/killed/version_0/checkpoints/last.ckpt/meta.pt").exists, first, seconds=300)
    os.kill(children(first)[0], signal.SIGKILL)
    first.communicate(timeout=120)
    assert first.returncode != 0

    undisturbed = start("config.yaml", "--trainer.logger.name", "whole")
    second = start("config.yaml", "--ckpt_path", "last")
    saved = tmp_path / "runs/killed/version_1/checkpoints/last.ckpt"
    wait_for((saved / "meta.pt").exists, second, seconds=300)
    wait_for(lambda: list(saved.parent.glob("last.ckpt.*.tmp")), second, pause=0.001)
    os.kill(children(second)[0], signal.SIGKILL)
    second.communicate(timeout=120)
    assert second.returncode != 0
    assert list(saved.parent.glob("last.ckpt.*.tmp"))  # the save was under way, and its predecessor is whole
    assert (saved / "meta.pt").exists()

    third = start("config.yaml", "--ckpt_path", "last")
    for run in (third, undisturbed):
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output[-3000:]

    whole = losses(tmp_path / "runs/whole/version_0")
    parts = [losses(folder) for folder in sorted((tmp_path / "runs/killed").iterdir())]
    assert len(whole) == STEPS
    assert [min(part) > 0 for part in parts] == [False, True, True]
    assert min(parts[2]) > min(parts[1])
    assert max(parts[2]) == STEPS - 1
    for part in parts:
        assert {step: whole[step] for step in part} == pytest.approx(part, rel=1e-3)
