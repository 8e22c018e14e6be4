"""Compile every kernel for a GPU that is not there: `python compile_kernels.py CAPABILITY`, such as 90 for 9.0.

Prints one JSON line a kernel: its name and the bytes of shared memory that it takes. Runs in a process of its own, for
it replaces Triton's driver and launches nothing.
"""

import json
import sys
from types import SimpleNamespace

import torch
import triton
from nsa_kernels import CompressionWeights, NSAConfig, native_sparse_attention
from nsa_kernels.decode import append as append_triton
from nsa_kernels.decode import parts as decode_parts
from nsa_kernels.decode import step as decode_triton
from nsa_kernels.decode.attention import LayerCache, NewToken, NewTokens, StartedBlocks
from nsa_kernels.triton import backend as triton_backend
from nsa_kernels.triton import elementwise as elementwise_triton
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
    q, gate = torch.zeros(2, H, D_qk, dtype=dtype), torch.zeros(2, D_qk, dtype=dtype)
    elementwise_triton.rotate(q, torch.zeros(2, D_qk // 2), torch.zeros(2, D_qk // 2))
    elementwise_triton.silu_product(gate, gate)
    elementwise_triton.add_norm(gate, gate, gate[0], 1e-5)


def decode(H: int, H_kv: int, D_qk: int, D_v: int, dtype: torch.dtype) -> None:
    """A step of decoding with a cache so large that blocks are chosen among segments, and with a short one."""
    B, config = 2, NSAConfig()
    l, S = config.compress_block_size, config.compress_block_size // config.compress_stride  # noqa: E741
    q, gates, positions = torch.zeros(B, H, D_qk, dtype=dtype), torch.zeros(B, H, 3, dtype=dtype), torch.zeros(B).int()
    cos = torch.zeros(B, D_qk // 2)

    def empty(*sizes: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(1, 1, 1, 1, dtype=dtype).expand(B, n, H_kv, D) for n in sizes for D in (D_qk, D_v))

    for slots, kind in ((2**18, None), (2**18, "mean"), (4096, "linear"), (4096, "mlp")):
        cache = LayerCache(*empty(slots, config.window_size, slots // config.compress_stride))
        (k, v, *_), pairs = cache, (*cache[:4], *empty(l))
        branches = [NewTokens(k[:, 0], v[:, 0], x, y, True) for x, y in zip(pairs[::2], pairs[1::2], strict=True)]
        weights = learned_parts(kind, H_kv, D_qk, D_v, dtype)
        widths = (0, 0) if weights is None else [side.in_weight.shape[2] for side in weights]
        started = StartedBlocks(*(torch.zeros(B, S, H_kv, width) for width in (D_qk, D_v, *widths)))
        new = NewToken(branches[:2], branches[2], started, weights, (cos, cos), (cos, cos))
        decode_triton.sparse_attention(q, gates, True, cache, positions, config, 1.0, new if kind else None)
    decode_parts.dense_attention(q, *cache[:2], positions, None, 1.0)
    append_triton.append_tokens(q, branches[:2], positions, cos, cos)


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
