"""Ragged packings, random inputs and block comparison that the tests of every attention backend share."""

import math
from typing import NamedTuple

import torch
from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.packing import compressed_block_centres
from torch import Tensor

SMALL = NSAConfig(
    compress_block_size=4,
    compress_stride=2,
    select_block_size=8,
    num_selected_blocks=4,
    num_init_blocks=1,
    num_local_blocks=2,
    window_size=6,
)
"""Sizes at which every edge shows within a few dozen tokens: n * l' = 32."""


def packings(config: NSAConfig) -> dict[str, list[int]]:
    """Named lists of document lengths around every size of `config`."""
    l, d, reach = config.compress_block_size, config.compress_stride, config.selected_tokens  # noqa: E741
    select, window = config.select_block_size, config.window_size
    single = {
        "one_token": 1,
        "stride_minus_1": d - 1,
        "compress_block_minus_1": l - 1,
        "compress_block": l,
        "compress_block_plus_1": l + 1,
        "select_block_minus_1": select - 1,
        "select_block": select,
        "select_block_plus_1": select + 1,
        "window_minus_1": window - 1,
        "window": window,
        "window_plus_1": window + 1,
        "reach_minus_1": reach - 1,
        "reach": reach,
        "reach_plus_1": reach + 1,
        "twice_the_reach": 2 * reach + d + 1,
    }
    named = {name: [length] for name, length in single.items() if length > 0}
    edges = [length for name, (length,) in named.items() if name != "twice_the_reach"]
    middle = len(edges) // 2
    mixed = [*edges[:middle], 0, *edges[middle:], 2 * reach + d + 1]
    sizes = d * l * select * window
    odd_end = next(end for end in range(1, sizes + 2) if math.gcd(sum(mixed) + end, sizes) == 1)
    return named | {
        "all_shorter_than_a_compress_block": [1, l - 1, max(d - 1, 1), l - 1],
        "empty_document_in_the_middle": [l + 1, 0, select + 1],
        "empty_documents_at_both_ends": [0, 0, select + l, 0],
        "mixed": [*mixed, odd_end],
    }


PACKINGS = packings(SMALL)


def cu_seqlens(lengths: list[int]) -> Tensor:
    """Document offsets, int32 [N + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Inputs(NamedTuple):
    """What `native_sparse_attention(**inputs._asdict(), config=config)` takes."""

    q: Tensor  # [T, H, D_qk]
    k: Tensor  # [T, H_kv, D_qk]
    v: Tensor  # [T, H_kv, D_v]
    gates: Tensor  # [T, H, 3]
    cu_seqlens: Tensor  # int32 [N + 1]
    sliding_k: Tensor | None = None  # [T, H_kv, D_qk]
    sliding_v: Tensor | None = None  # [T, H_kv, D_v]
    compress_k: Tensor | None = None  # [T, H_kv, D_qk]
    compress_v: Tensor | None = None  # [T, H_kv, D_v]
    k_weights: CompressionWeights | None = None
    v_weights: CompressionWeights | None = None
    compressed_rotary: tuple[Tensor, Tensor] | None = None  # cos, sin, each [C, R/2]

    def leaves(self) -> dict[str, Tensor]:
        """Every input and parameter that has a gradient, by name; φ as `k_weights.in_bias` and so on."""
        named = {}
        for name, value in self._asdict().items():
            if isinstance(value, CompressionWeights):
                named |= {f"{name}.{part}": w for part, w in value._asdict().items() if w is not None}
            elif isinstance(value, Tensor) and name != "cu_seqlens":
                named[name] = value
        return named

    def replace_leaves(self, leaves: dict[str, Tensor]) -> "Inputs":
        """The same inputs with other tensors in the place of `leaves()`."""
        values = self._asdict() | {name: leaf for name, leaf in leaves.items() if "." not in name}
        for name in ("k_weights", "v_weights"):
            parts = {key.partition(".")[2]: leaf for key, leaf in leaves.items() if key.startswith(f"{name}.")}
            if parts:
                values[name] = values[name]._replace(**parts)
        return Inputs(**values)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Inputs":
        """Copies on another device or in another dtype, cut from any graph, that collect gradients of their own."""
        leaves = {
            name: leaf.detach().clone().to(device=device, dtype=dtype).requires_grad_()
            for name, leaf in self.leaves().items()
        }
        rotary = self.compressed_rotary and tuple(
            part.to(device=device, dtype=dtype) for part in self.compressed_rotary
        )
        return self.replace_leaves(leaves)._replace(
            cu_seqlens=self.cu_seqlens.to(device=device), compressed_rotary=rotary
        )


def random_weights(
    kind: str, num_kv_heads: int, head_dim: int, config: NSAConfig, generator: torch.Generator
) -> CompressionWeights | None:
    """φ of kind "mean" (None), "linear" or "mlp", away from its start at the mean; float64."""
    l, D = config.compress_block_size, head_dim  # noqa: E741
    M = {"mean": 0, "linear": D, "mlp": D + 1}[kind]

    def random(*shape: int) -> Tensor:
        return torch.randn(num_kv_heads, *shape, dtype=torch.float64, generator=generator)

    if kind == "mean":
        return None
    weights = CompressionWeights(random(l, D), random(l * D, M) / (l * D) ** 0.5, random(M))
    if kind == "linear":
        return weights
    return weights._replace(out_weight=random(M, D) / M**0.5, out_bias=random(D))


def block_rotary(offsets: Tensor, num_tokens: int, config: NSAConfig, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of each compression block's centre, float64 [C, R/2]."""
    frequencies = 10.0 ** -torch.arange(rotary_dim // 2, dtype=torch.float64, device=offsets.device)
    angles = compressed_block_centres(offsets, num_tokens, config)[:, None] * frequencies
    return angles.cos(), angles.sin()


def random_inputs(
    lengths: list[int],
    config: NSAConfig = SMALL,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    qk_dim: int = 6,
    v_dim: int = 5,
    kind: str = "mlp",
    separate: bool = True,
    rotary: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Inputs:
    """Random inputs of every branch, drawn in float64 and cast, so that one seed gives one problem in every dtype.

    Args:
        lengths: tokens of each document.
        config: sizes of the blocks.
        num_heads: H.
        num_kv_heads: H_kv.
        qk_dim: D_qk.
        v_dim: D_v.
        kind: φ of keys and values, "mean", "linear" or "mlp".
        separate: draw keys and values for each branch; else all three share one pair.
        rotary: rotate the first 2 * (qk_dim // 4) dimensions of the compressed keys at their blocks' centres.
        dtype: of every float input.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    T = sum(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(T, *shape, dtype=torch.float64, generator=generator)

    offsets = cu_seqlens(lengths)
    q, gates = 2 * random(num_heads, qk_dim), random(num_heads, 3).sigmoid()
    pairs = [(random(num_kv_heads, qk_dim), random(num_kv_heads, v_dim)) for _ in range(3)]
    (k, v), sliding, compressed = pairs if separate else (pairs[0], (None, None), (None, None))
    inputs = Inputs(
        q,
        k,
        v,
        gates,
        offsets,
        *sliding,
        *compressed,
        k_weights=random_weights(kind, num_kv_heads, qk_dim, config, generator),
        v_weights=random_weights(kind, num_kv_heads, v_dim, config, generator),
        compressed_rotary=block_rotary(offsets, T, config, 2 * (qk_dim // 4)) if rotary else None,
    )
    return inputs.to(dtype=dtype)


def one_document(inputs: Inputs, index: int, config: NSAConfig) -> Inputs:
    """Document `index` of a packed batch alone: views of its tokens, and the same φ."""
    start, end = inputs.cu_seqlens[index : index + 2].tolist()
    leaves = {name: leaf if "." in name else leaf[start:end] for name, leaf in inputs.leaves().items()}
    offsets = inputs.cu_seqlens[index : index + 2] - start
    rotary = inputs.compressed_rotary
    if rotary is not None:
        cos, sin = block_rotary(offsets.int(), end - start, config, 2 * rotary[0].shape[-1])
        rotary = cos.to(rotary[0].dtype), sin.to(rotary[1].dtype)
    return inputs.replace_leaves(leaves)._replace(cu_seqlens=offsets.int(), compressed_rotary=rotary)


def chosen_sets(block_indices: Tensor) -> list[list[frozenset[int]]]:
    """The chosen blocks of each query and KV head, [T][H_kv]; they must be ascending and end in empty slots (-1)."""
    sets = []
    for query in block_indices.tolist():
        chosen = [[j for j in slots if j != -1] for slots in query]
        for blocks, slots in zip(chosen, query, strict=True):
            expected = sorted(set(blocks)) + [-1] * (len(slots) - len(blocks))
            assert slots == expected, f"not ascending, then -1: {slots}"
        sets.append([frozenset(blocks) for blocks in chosen])
    return sets


def assert_same_blocks(actual: Tensor, expected: Tensor, importance: Tensor, tolerance: float) -> int:
    """Demand equal choices, save where the blocks that differ are tied within `tolerance`.

    Args:
        actual: block indices of the backend under test, [T, H_kv, n].
        expected: block indices of the reference, [T, H_kv, n].
        importance: `reference.block_importance`, [T, H_kv, J].
        tolerance: largest importance gap that rounding may turn round.

    Returns:
        How many rows differ, for the caller to bound.
    """
    differing = 0
    assert actual.shape == expected.shape
    for t, (row, expected_row) in enumerate(zip(chosen_sets(actual), chosen_sets(expected), strict=True)):
        for g, (blocks, expected_blocks) in enumerate(zip(row, expected_row, strict=True)):
            if blocks == expected_blocks:
                continue
            differing += 1
            where = f"query {t}, KV head {g}: chose {sorted(blocks)}, expected {sorted(expected_blocks)}"
            assert len(blocks) == len(expected_blocks), where
            assert max(blocks) < importance.shape[-1], where
            scores = importance[t, g, sorted(blocks ^ expected_blocks)]
            gap = (scores.max() - scores.min()).item()
            assert gap <= tolerance, f"{where}; the importance gap is {gap}"
    return differing
