"""Every kernel compiles for every class of GPU, and fits its shared memory; no GPU is needed for that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "support" / "compile_kernels.py"
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # of one program: A100, Ada, H100, B200
KERNELS = {
    "_mean_kernel",
    "_forward_kernel",
    "_importance_kernel",
    "_rank_kernel",
    "_union_kernel",
    "_dq_kernel",
    "_dkv_kernel",
    "_parts_kernel",
    "_summaries_kernel",
    "_choose_kernel",
    "_merge_segments_kernel",
    "_tokens_kernel",
    "_append_kernel",
    "_rotate_kernel",
    "_silu_product_kernel",
    "_add_norm_kernel",
    "_gated_sum_kernel",
}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_and_fit_the_shared_memory(capability):
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, str(capability)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    too_large = [entry for entry in compiled if entry["shared"] > SHARED_BYTES[capability]]
    assert not too_large
    assert {entry["kernel"] for entry in compiled} >= KERNELS
