"""Compile every kernel for a GPU that is not there: `python compile_kernels.py CAPABILITY`, such as 90 for 9.0.

Prints one JSON line a kernel: its module and name, the inputs that it was compiled for and their head dim, the bytes of
shared memory that a program takes, and the registers and bytes of spilled registers of a thread. Runs in a process of
its own, for it replaces Triton's driver and launches nothing.
"""

import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from nsa_kernels import CompressionWeights, NSAConfig, backends, native_sparse_attention
from nsa_kernels.decode.append import launch_append
from nsa_kernels.decode.attention import LayerCache, NewToken, NewTokens, StartedBlocks, chunk_attention
from nsa_kernels.decode.parts import launch_dense_attention
from nsa_kernels.decode.step import attend_step
from nsa_kernels.triton import elementwise
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction


class Shape(NamedTuple):
    """Heads and dtype of the inputs."""

    H: int
    H_KV: int
    D_QK: int
    D_V: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.H}/{self.H_KV} heads of {self.D_QK} and {self.D_V}, {self.dtype}"


SHAPES = [
    Shape(16, 1, 128, 128, torch.bfloat16),
    Shape(9, 3, 64, 64, torch.float16),
    Shape(8, 2, 256, 256, torch.bfloat16),
]
HOPPER_SHAPES = [  # with the first above groups of 4 and of 16 heads, of 64 and of 128 dims
    Shape(16, 1, 64, 64, torch.bfloat16),
    Shape(16, 4, 128, 128, torch.bfloat16),
]
SHAPES_OF = {80: SHAPES, 89: SHAPES[::2], 90: SHAPES[1::-1], 100: SHAPES[:1]}
"""By capability: 8.9 has the least shared memory, and newer chips take the choices of 8.0 for wide heads."""
TOKENS = 1500
"""More than a query selects, so that blocks are ranked."""


class AbsentGPU:
    """As much of a driver as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Compiler:
    """Compiles what is launched, and reports it."""

    def __init__(self) -> None:
        self.inputs, self.head_dim = "", 0
        run = JITFunction.run

        def compile_only(function, *args, grid, warmup, **options):
            compiled = run(function, *args, grid=grid, warmup=True, **options)
            self.report(f"{function.__module__.removeprefix('nsa_kernels.')}.{function.__name__}", compiled)
            return compiled

        JITFunction.run = compile_only

    def report(self, kernel: str, compiled) -> None:
        registers, spilled = thread_resources(compiled.asm["cubin"])
        entry = {"kernel": kernel, "inputs": self.inputs, "head_dim": self.head_dim, "shared": compiled.metadata.shared}
        print(json.dumps(entry | {"registers": registers, "spilled": spilled}))


def thread_resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: the kernels have no other use for one than spilled registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump reports no registers: {usage}")
    return int(found[1]), int(found[2])


def main(capability: int) -> None:
    triton.runtime.driver.set_active(AbsentGPU(capability))
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    choose = backends._choose
    backends._chosen = lambda inputs: choose(inputs._replace(capability=divmod(capability, 10)))
    compiler = Compiler()
    for shape in SHAPES_OF[capability]:
        compiler.head_dim = max(shape.D_QK, shape.D_V)
        compiler.inputs = f"forward, {shape}"
        attend(shape, selects=True)
        compiler.inputs = f"training, {shape}"
        train(shape)
    for shape in HOPPER_SHAPES if capability // 10 == 9 else ():
        compiler.head_dim = max(shape.D_QK, shape.D_V)
        compiler.inputs = f"training, {shape}"
        train(shape)
    if capability // 10 == 9:  # elsewhere a prompt's chunk runs the kernels of training with other constants
        compiler.head_dim = max(SHAPES[0].D_QK, SHAPES[0].D_V)
        compiler.inputs = f"prefill, {SHAPES[0]}"
        prefill(SHAPES[0])
    widest = SHAPES_OF[capability][-1]
    compiler.head_dim = max(widest.D_QK, widest.D_V)
    decode(*widest, compiler)
    compiler.inputs = "elementwise"
    H, _, D, _, dtype = widest
    q, gate = torch.zeros(2, H, D, dtype=dtype), torch.zeros(2, D, dtype=dtype)
    elementwise.launch_rotate(q, torch.zeros(2, D // 2), torch.zeros(2, D // 2))
    elementwise.launch_silu_product(gate, gate)
    elementwise.launch_add_norm(gate, gate, gate[0], 1e-5)


def attend(shape: Shape, *, selects: bool) -> torch.Tensor:
    """The gated sum of the branches, of blocks that it selects or that are given."""
    H, H_KV, D_QK, D_V, dtype = shape
    sizes = (H, D_QK), (H_KV, D_QK), (H_KV, D_V)
    q, k, v = (torch.zeros(TOKENS, *size, dtype=dtype, requires_grad=True) for size in sizes)
    gates, cu_seqlens = torch.zeros(TOKENS, H, 3, dtype=dtype), torch.tensor([0, TOKENS], dtype=torch.int32)
    blocks = None if selects else torch.zeros(TOKENS, H_KV, 16, dtype=torch.int32)
    return native_sparse_attention(
        q, k, v, gates, cu_seqlens, NSAConfig(), backend="triton", block_indices=blocks
    ).out  # fmt: skip


def train(shape: Shape) -> None:
    """Forward and backward through all branches."""
    out = attend(shape, selects=False)
    out.backward(torch.zeros_like(out))


def prefill(shape: Shape) -> None:
    """A chunk of a prompt whose beginning is cached."""
    H, H_KV, D_QK, D_V, dtype = shape
    q, gates = torch.zeros(TOKENS // 2, H, D_QK, dtype=dtype), torch.zeros(TOKENS // 2, H, 3, dtype=dtype)
    k, v = (torch.zeros(TOKENS, H_KV, D, dtype=dtype) for D in (D_QK, D_V))
    chunk_attention(q, gates, k, v, k, v, k, v, NSAConfig(), backend="triton")


def decode(H: int, H_kv: int, D_qk: int, D_v: int, dtype: torch.dtype, compiler: Compiler) -> None:
    """A step of decoding with a cache so large that blocks are chosen among segments, and with a short one."""
    B, config = 2, NSAConfig()
    l, S = config.compress_block_size, config.compress_block_size // config.compress_stride  # noqa: E741
    q, gates, positions = torch.zeros(B, H, D_qk, dtype=dtype), torch.zeros(B, H, 3, dtype=dtype), torch.zeros(B).int()
    cos = torch.zeros(B, D_qk // 2)

    def empty(*sizes: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(1, 1, 1, 1, dtype=dtype).expand(B, n, H_kv, D) for n in sizes for D in (D_qk, D_v))

    for slots, kind in ((2**18, None), (2**18, "mean"), (4096, "linear"), (4096, "mlp")):
        compiler.inputs = f"decoding, {slots} slots, {kind}"
        cache = LayerCache(*empty(slots, config.window_size, slots // config.compress_stride))
        (k, v, *_), pairs = cache, (*cache[:4], *empty(l))
        branches = [NewTokens(k[:, 0], v[:, 0], x, y, True) for x, y in zip(pairs[::2], pairs[1::2], strict=True)]
        weights = learned_parts(kind, H_kv, D_qk, D_v, dtype)
        widths = (0, 0) if weights is None else [side.in_weight.shape[2] for side in weights]
        started = StartedBlocks(*(torch.zeros(B, S, H_kv, width) for width in (D_qk, D_v, *widths)))
        new = NewToken(branches[:2], branches[2], started, weights, (cos, cos), (cos, cos))
        attend_step(q, gates, True, cache, positions, config, 1.0, new if kind else None)
    compiler.inputs = "decoding"
    launch_dense_attention(q, *cache[:2], positions, None, 1.0)
    launch_append(q, branches[:2], positions, cos, cos)


def learned_parts(kind: str | None, H_kv: int, D_qk: int, D_v: int, dtype: torch.dtype):
    """The weights of both summaries of one kind."""
    if kind not in ("linear", "mlp"):
        return None
    l, hidden = NSAConfig().compress_block_size, 512  # noqa: E741
    return tuple(
        CompressionWeights(*(torch.zeros(H_kv, *size, dtype=dtype) for size in sizes))
        for D in (D_qk, D_v)
        for M in [hidden if kind == "mlp" else D]
        for sizes in [((l, D), (l * D, M), (M,), *([(M, D), (D,)] if kind == "mlp" else []))]
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
