"""Compile every kernel for a GPU that is not there: `python compile_kernels.py CAPABILITY`, such as 90 for 9.0.

Prints one JSON line a kernel: its name and the bytes of shared memory that it takes. Runs in a process of its own, for
it replaces Triton's driver and launches nothing.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
from nsa_kernels import (
    CompressionWeights,
    NSAConfig,
    append_triton,
    decode_parts,
    decode_triton,
    elementwise_triton,
    native_sparse_attention,
    summarise_triton,
    triton_backend,
)
from nsa_kernels.decode import LayerCache, NewTokens
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHAPES = [  # H, H_kv, D_qk, D_v, dtype
    (16, 1, 128, 128, torch.bfloat16),
    (9, 3, 64, 64, torch.float16),
    (8, 2, 256, 256, torch.bfloat16),
]


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


def main(capability: int) -> None:
    triton.runtime.driver.set_active(AbsentGPU(capability))
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
    triton_backend.reason_against = lambda q, v, config: None
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.__name__, "shared": compiled.metadata.shared}))
        return compiled

    JITFunction.run = compile_only
    T = 1500  # more than the tokens that a query selects, so that blocks are ranked
    for H, H_kv, D_qk, D_v, dtype in SHAPES:
        q, k, v = (
            torch.zeros(T, *size, dtype=dtype, requires_grad=True) for size in ((H, D_qk), (H_kv, D_qk), (H_kv, D_v))
        )
        gates, cu_seqlens = torch.zeros(T, H, 3, dtype=dtype), torch.tensor([0, T], dtype=torch.int32)
        blocks = torch.zeros(T, H_kv, 16, dtype=torch.int32)
        native_sparse_attention(q, k, v, gates, cu_seqlens, NSAConfig(), backend="triton")
        out = native_sparse_attention(
            q, k, v, gates, cu_seqlens, NSAConfig(), backend="triton", block_indices=blocks
        ).out
        out.backward(torch.zeros_like(out))
    q, k, v = (torch.zeros(T, heads, 128, dtype=dtype) for heads in (H, H_kv, H_kv))  # two parts a tile on Hopper
    triton_backend.selected_attention(q, k, v, blocks, cu_seqlens, NSAConfig())
    decode(*SHAPES[-1])
    summarise(*SHAPES[-1][1:])
    q, gate = torch.zeros(2, H, D_qk, dtype=dtype), torch.zeros(2, D_qk, dtype=dtype)
    elementwise_triton.rotate(q, torch.zeros(2, D_qk // 2), torch.zeros(2, D_qk // 2))
    elementwise_triton.silu_product(gate, gate)
    elementwise_triton.add_norm(gate, gate, gate[0], 1e-5)


def decode(H: int, H_kv: int, D_qk: int, D_v: int, dtype: torch.dtype) -> None:
    """A step of decoding with a cache so large that blocks are chosen among segments."""
    B, S, config = 2, 2**18, NSAConfig()
    cache = LayerCache(
        *(
            torch.zeros(1, 1, 1, 1, dtype=dtype).expand(B, slots, H_kv, D)
            for slots in (S, config.window_size, S // config.compress_stride)
            for D in (D_qk, D_v)
        )
    )
    q, gates, positions = torch.zeros(B, H, D_qk, dtype=dtype), torch.zeros(B, H, 3, dtype=dtype), torch.zeros(B).int()
    decode_triton.sparse_attention(q, gates, True, cache, positions, config, 1.0)
    decode_parts.dense_attention(q, *cache[:2], positions, None, 1.0)
    cos = torch.zeros(B, D_qk // 2)
    pairs = [NewTokens(x[:, 0], y[:, 0], x, y, True) for x, y in (cache[:2], cache[2:4])]
    append_triton.append_tokens(q, pairs, positions, cos, cos)


def summarise(H_kv: int, D_qk: int, D_v: int, dtype: torch.dtype) -> None:
    """Summaries of every kind of the blocks that new tokens complete."""
    B, l, M = 2, 32, 512  # noqa: E741
    pending, summaries = (tuple(torch.zeros(B, n, H_kv, D, dtype=dtype) for D in (D_qk, D_v)) for n in (l, 64))
    rotary = torch.zeros(B, D_qk // 2), torch.zeros(B, D_qk // 2)
    linear, mlp = (
        tuple(
            CompressionWeights(*(torch.zeros(H_kv, *size, dtype=dtype) for size in sizes))
            for D in (D_qk, D_v)
            for sizes in [((l, D), (l * D, M or D), (M or D,), *([(M, D), (D,)] if M else []))]
        )
        for M in (None, M)
    )
    for weights in (None, linear, mlp):
        summarise_triton.summarise_blocks(pending, summaries, torch.zeros(B).long(), 16, weights, rotary)


if __name__ == "__main__":
    main(int(sys.argv[1]))
