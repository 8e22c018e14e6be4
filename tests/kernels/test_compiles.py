"""Every kernel compiles for every class of GPU, and fits its shared memory and registers; no GPU is needed for that."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program: A100, Ada, H100, B200
KERNELS = {
    "decode.append._append_kernel",
    "decode.parts._merge_kernel",
    "decode.parts._parts_kernel",
    "decode.step._choose_kernel",
    "decode.step._gated_sum_kernel",
    "decode.step._merge_segments_kernel",
    "decode.step._tokens_kernel",
    "decode.summaries._summaries_kernel",
    "triton.block_attention._dkv_kernel",
    "triton.block_attention._forward_kernel",
    "triton.block_attention._sum_parts_kernel",
    "triton.block_lists._union_kernel",
    "triton.block_selection._importance_kernel",
    "triton.block_selection._rank_kernel",
    "triton.compress._mean_kernel",
    "triton.compress._scatter_kernel",
    "triton.elementwise._add_norm_kernel",
    "triton.elementwise._rotate_kernel",
    "triton.elementwise._silu_product_kernel",
    "triton.query_gradient._dq_kernel",
    "triton.run_attention._dkv_kernel",
    "triton.run_attention._forward_kernel",
    "triton.run_attention._sum_parts_kernel",
}
HOPPER_KERNELS = {
    "hopper.block_attention._forward_kernel",
    "hopper.block_gradients._dkv_kernel",
    "hopper.query_gradient._dq_kernel",
    "hopper.run_attention._forward_kernel",
    "hopper.run_gradients._dkv_kernel",
}
MOST_SPILLED = {  # bytes of a thread in heads of up to 128 dims, with triton 3.6 and 3.7; the others spill none
    80: {
        "triton.block_attention._forward_kernel": 56,
        "triton.query_gradient._dq_kernel": 256,
        "triton.run_attention._dkv_kernel": 40,
        "triton.run_attention._forward_kernel": 472,
    },
    89: {
        "triton.block_attention._forward_kernel": 224,
        "triton.query_gradient._dq_kernel": 152,
        "triton.run_attention._dkv_kernel": 40,
        "triton.run_attention._forward_kernel": 352,
    },
    90: {
        "hopper.block_attention._forward_kernel": 8,
        "hopper.query_gradient._dq_kernel": 72,
        "hopper.run_gradients._dkv_kernel": 16,
        "triton.block_attention._dkv_kernel": 56,
        "triton.query_gradient._dq_kernel": 16,
    },
    100: {"triton.block_attention._sum_parts_kernel": 32, "triton.run_attention._dkv_kernel": 16},
}
SPILL_WIDE_HEADS = {  # of 256 dims, which fit no chip's registers
    "triton.block_attention._dkv_kernel",
    "triton.block_attention._forward_kernel",
    "triton.block_attention._sum_parts_kernel",
    "triton.block_selection._importance_kernel",
    "triton.query_gradient._dq_kernel",
    "triton.run_attention._dkv_kernel",
    "triton.run_attention._forward_kernel",
}


@functools.cache
def compiled(capability: int) -> list[dict[str, Any]]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit_the_shared_memory(capability):
    too_large = [entry for entry in compiled(capability) if entry["shared"] > SHARED_BYTES[capability]]
    assert not too_large
    # on Hopper that kernel is left to wide heads, which 8.0 compiles with the same choices
    expected = KERNELS - {"triton.run_attention._dkv_kernel"} | HOPPER_KERNELS if capability == 90 else KERNELS
    assert {entry["kernel"] for entry in compiled(capability)} >= expected


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_spill_no_more_registers_than_they_did(capability):
    entries = compiled(capability)
    assert all(0 < entry["registers"] <= 255 for entry in entries)
    wide = [entry for entry in entries if entry["head_dim"] > 128]
    assert wide or capability in (90, 100)
    assert {entry["kernel"] for entry in wide if entry["spilled"]} <= SPILL_WIDE_HEADS
    bound = MOST_SPILLED[capability]
    over = [e for e in entries if e["head_dim"] <= 128 and e["spilled"] > bound.get(e["kernel"], 0)]
    assert not over
