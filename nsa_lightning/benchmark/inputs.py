"""Inputs of the measurements: independent random ones, and ones whose neighbouring queries choose alike.

    q_t = sqrt(1 - f_t) · slow_t + sqrt(f_t) · fast_t

In a real model neighbouring tokens look for similar things, and a kernel may load a block once for all of them.
Independent queries share only the forced blocks, so both kinds of input are measured. `overlap` inputs imitate
SmolLM2-135M on source code (8K tokens, queries past 4K, 16 blocks a query): there the union of 2, 4, 8 and 16
neighbouring queries holds 18.2, 20.6, 23.4 and 26.5 blocks, averaged over layers and heads.

`slow` and `fast` are first-order autoregressive processes (a moving average over the past tokens with an exponential
kernel), independent in each head and dimension; k and v are independent normal. Scores then rank blocks by a Gaussian
process whose short-range correlation is set by the constants below. They were fitted on the CPU by the blocks that
`block_selection` chose (eager backend, default NSAConfig, bf16 inputs). `tests/benchmark/test_inputs.py` repeats that
measurement, and `nsa bench kernels` prints the unions of its own inputs.
"""

import math
from typing import NamedTuple

import torch
from nsa_kernels import NSAConfig
from nsa_kernels.packing import document_index, document_positions
from torch import Tensor

from nsa_lightning.benchmark.cases import InputKind, Shape

# T packed tokens, N documents, H query heads, H_kv KV heads, D_qk and D_v head dims, n selected blocks.

SLOW_TOKENS = 512.0
"""Time constant of what a passage looks for."""

FAST_SHARES = {0.0: 0.029, 8.0: 0.07}
"""Time constant in tokens (0 for white noise) -> share of the variance that changes so fast."""

MAX_CANDIDATE_SHARE = 0.25
"""The share of blocks that is chosen is taken as at most this; it is so from 3.3K tokens of a document on."""

MEASURED_UNIONS = {2: 18.2, 4: 20.6, 8: 23.4, 16: 26.5}
"""What the constants were fitted to: neighbouring queries -> distinct blocks they select."""

_SLICE_ELEMENTS = 2**26
_SCAN_TOKENS = 64


class Inputs(NamedTuple):
    """What one attention layer reads."""

    q: Tensor  # [T, H, D_qk]
    k: Tensor  # [T, H_kv, D_qk]
    v: Tensor  # [T, H_kv, D_v]
    gates: Tensor  # [T, H, 3]
    cu_seqlens: Tensor  # int32 [N + 1]

    def leaves(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and gates, which have gradients."""
        return self.q, self.k, self.v, self.gates


def make_inputs(
    kind: InputKind, shape: Shape, lengths: list[int], config: NSAConfig, dtype: torch.dtype, device: torch.device
) -> Inputs:
    """Draw the inputs of one measurement; the same arguments give the same numbers.

    Args:
        kind: `random`, independent normal q, or `overlap`, q that changes slowly from token to token.
        shape: heads and head dimensions.
        lengths: tokens of each document.
        config: block sizes and counts.
        dtype: of q, k, v and gates.
        device: where they are drawn.

    Returns:
        Inputs that collect gradients.
    """
    generator = torch.Generator(device).manual_seed(0)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    T = sum(lengths)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    if kind == "overlap":
        q = _overlapping_queries(shape, cu_seqlens, T, config, dtype, generator)
    else:
        q = normal(T, shape.num_heads, shape.qk_dim)
    k, v = normal(T, shape.num_kv_heads, shape.qk_dim), normal(T, shape.num_kv_heads, shape.v_dim)
    gates = torch.rand(T, shape.num_heads, 3, generator=generator, dtype=dtype, device=device)
    for leaf in (q, k, v, gates):
        leaf.requires_grad_()
    return Inputs(q, k, v, gates, cu_seqlens)


def _overlapping_queries(
    shape: Shape, cu_seqlens: Tensor, num_tokens: int, config: NSAConfig, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Queries of the module's equation, [T, H, D_qk]; float32 buffers hold a slice of the heads."""
    device = cu_seqlens.device
    q = torch.empty(num_tokens, shape.num_heads, shape.qk_dim, dtype=dtype, device=device)
    fast_share = sum(FAST_SHARES.values()) * _fast_variance(cu_seqlens, num_tokens, config)[:, None, None]
    heads = max(1, _SLICE_ELEMENTS // (num_tokens * shape.qk_dim))
    for part in q.split(heads, dim=1):

        def process(tokens: float, size: torch.Size = part.shape) -> Tensor:
            noise = torch.randn(size, generator=generator, device=device).flatten(1)
            return autoregressive(noise, math.exp(-1 / tokens) if tokens else 0.0).view(size)

        fast = torch.zeros(part.shape, device=device)
        for tokens, share in FAST_SHARES.items():
            fast += process(tokens).mul_(math.sqrt(share / sum(FAST_SHARES.values())))
        part.copy_(process(SLOW_TOKENS).mul_((1 - fast_share).sqrt()).add_(fast.mul_(fast_share.sqrt())))
    return q


def _fast_variance(cu_seqlens: Tensor, num_tokens: int, config: NSAConfig) -> Tensor:
    """Factor of the fast share at each token, float32 [T].

    A change of the scores by a small δ swaps about (chosen blocks) · x · δ blocks, where x is the score, in standard
    deviations, that a block must reach to be chosen: the more blocks compete, the higher. Dividing δ by x makes the
    unions independent of the length of the document.
    """
    position = document_positions(cu_seqlens, num_tokens)
    free = config.num_selected_blocks - config.num_init_blocks - config.num_local_blocks
    chosen = free * config.select_block_size / (position + 1.0)
    threshold = math.sqrt(2) * torch.erfinv(1 - 2 * chosen.clamp(1e-6, MAX_CANDIDATE_SHARE))
    return threshold.pow(-2).float()


def autoregressive(noise: Tensor, coefficient: float) -> Tensor:
    """Unit-variance x_t = a · x_{t-1} + sqrt(1 - a²) · noise_t, x_0 = noise_0, float32 [T, D], in a few products.

    A run of tokens is one product with the powers of a; what runs pass on to each other is again such a process, of
    coefficient a ** (tokens in a run).
    """
    if coefficient == 0.0:
        return noise
    noise = noise * math.sqrt(1 - coefficient**2)
    noise[0] /= math.sqrt(1 - coefficient**2)
    return _scan(noise, coefficient)


def _scan(x: Tensor, a: float) -> Tensor:
    """y_t = a · y_{t-1} + x_t over the first dimension."""
    size, (num_tokens, dims) = _SCAN_TOKENS, x.shape
    steps = torch.arange(size, dtype=torch.float64, device=x.device)
    distance = steps[:, None] - steps
    powers = (a ** distance.clamp(min=0)).masked_fill(distance < 0, 0.0).float()  # [L, L]
    if num_tokens <= size:
        return powers[:num_tokens, :num_tokens] @ x
    padded = torch.nn.functional.pad(x, (0, 0, 0, -num_tokens % size))
    y = powers @ padded.view(-1, size, dims)  # [runs, L, D]
    carried = _scan(y[:, -1].contiguous(), a**size)
    y[1:] += (a ** (steps + 1)).float()[:, None] * carried[:-1, None]
    return y.view(-1, dims)[:num_tokens]


def neighbour_union(
    block_indices: Tensor, neighbours: int, cu_seqlens: Tensor, config: NSAConfig, first_position: int | None = None
) -> float | None:
    """Mean number of distinct blocks that a run of neighbouring queries of one KV head selects.

    Args:
        block_indices: int32 [T, H_kv, n], -1 for none.
        neighbours: queries in a run; runs are `neighbours` apart.
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes and counts.
        first_position: leave out earlier queries of each document; by default those that see n blocks or fewer.

    Returns:
        None if no run of such queries lies in one document.
    """
    T, H_kv, n = block_indices.shape
    num_runs = T // neighbours
    start = config.selected_tokens if first_position is None else first_position
    document = document_index(cu_seqlens, T)[: num_runs * neighbours].view(num_runs, neighbours)
    position = document_positions(cu_seqlens, T)[: num_runs * neighbours].view(num_runs, neighbours)
    counted = (document[:, 0] == document[:, -1]) & (position[:, 0] >= start)
    runs = block_indices[: num_runs * neighbours].view(num_runs, neighbours, H_kv, n)[counted]
    if not len(runs):
        return None
    total = 0
    for part in runs.split(max(1, _SLICE_ELEMENTS // (neighbours * H_kv * n))):
        blocks = part.transpose(1, 2).flatten(2).sort(-1).values  # [runs, H_kv, neighbours · n]
        new = torch.cat([torch.ones_like(blocks[..., :1], dtype=torch.bool), blocks.diff(dim=-1) != 0], dim=-1)
        total += int((new & (blocks >= 0)).sum())
    return total / (len(runs) * H_kv)
