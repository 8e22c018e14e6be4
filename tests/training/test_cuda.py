"""Two GPUs compute what one does: with sequences of their own, and with sequences that both share."""

import pytest
import torch
from support.same_run import assert_same_run
from support.training import run_job

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1200)]  # kernels are compiled for float32 and bfloat16

MODEL = {
    "hidden_size": 128, "num_layers": 3, "attention": ["nsa", "full", "sliding"], "sliding_window": 100,
    "num_heads": 8, "num_kv_heads": 2, "head_dim": 64,
    "nsa": {"kv_sharing": "separate", "branch_start": "independent",
            "compress_block_size": 32, "compress_stride": 16, "select_block_size": 32, "window_size": 64},
}  # fmt: skip
SEQUENCES = {"model": {"transformer": MODEL}, "data": {"seq_len": 1024, "batch_size": 2}}
DOCUMENTS = {"model": {"transformer": MODEL}, "lengths": [700, 1, 1200, 147]}  # ranks part in the middle of the third
RUNS = {
    "fsdp2": (SEQUENCES, {"strategy": "fsdp2", "data": {"seq_len": 1024, "batch_size": 1}}),
    "context parallel": (DOCUMENTS, {"strategy": "context_parallel"}),
    "recomputed": (
        DOCUMENTS, {"strategy": "context_parallel", "model": DOCUMENTS["model"] | {"activation_checkpointing": "block"}}
    ),
}  # fmt: skip
"""What one GPU runs, and what two of them do otherwise."""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance", "of_largest"), [("32-true", 1e-5, 1e-3), ("bf16-mixed", 0.02, 0.2)])
def test_two_gpus_train_as_one(folder, precision, tolerance, of_largest):
    """Losses, norms and gradients, these within a share of the largest number of each parameter's."""
    settings = {"accelerator": "gpu", "precision": precision, "max_steps": 3, "max_epochs": -1, "strategy": "fsdp2"}
    settings |= {"root": str(folder / "runs"), "corpus": str(folder / "corpus")}
    alone = run_job(folder, *(settings | one for one, _ in RUNS.values()), ranks=1, timeout=500)
    together = run_job(folder, *(settings | one | changes for one, changes in RUNS.values()), timeout=500)
    bounds = {"relative": tolerance, "tolerance": of_largest, "tensors": ["gradients"]}
    for actual, expected in zip(together, alone, strict=True):
        assert_same_run(actual, expected, steps=settings["max_steps"], **bounds)
