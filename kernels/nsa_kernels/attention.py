"""Native Sparse Attention: what every backend is asked for, checked and handed on (arXiv:2502.11089).

o_t = g^cmp · o^cmp + g^slc · o^slc + g^win · o^win
"""

from torch import Tensor

from nsa_kernels import eager, reference
from nsa_kernels.backends import Backend, plan, readable
from nsa_kernels.errors import SettingError
from nsa_kernels.geometry import Branches, CompressionWeights, NSAConfig, NSAOutput
from nsa_kernels.packing import BatchLayout, batch_layout
from nsa_kernels.precision import without_autocast

# T packed tokens, N documents, H query heads, H_kv KV heads, D_qk and D_v head dims, C rows of compressed blocks.


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    *,
    sliding_k: Tensor | None = None,
    sliding_v: Tensor | None = None,
    compress_k: Tensor | None = None,
    compress_v: Tensor | None = None,
    k_weights: CompressionWeights | None = None,
    v_weights: CompressionWeights | None = None,
    compressed_rotary: tuple[Tensor, Tensor] | None = None,
    block_indices: Tensor | None = None,
    scale: float | None = None,
    layout: BatchLayout | None = None,
    backend: Backend = "auto",
) -> NSAOutput:
    """Attend each query through the compressed, the selected and the sliding branch and sum them by their gates.

    Documents are packed end to end and never see each other. Query head h reads KV head h // (H / H_kv). Autocast
    changes nothing: inputs are computed with in the dtypes that they have.

    Args:
        q: queries with their position applied, [T, H, D_qk].
        k: keys of the selected branch, [T, H_kv, D_qk].
        v: values of the selected branch, [T, H_kv, D_v].
        gates: branch weights, [T, H, 3]: compressed, selected, sliding; a sigmoid's, or others. On a GPU
            the Triton kernels give NaN as gradients through a negative one: to see it, the host would have to wait.
        cu_seqlens: document offsets, int32 [N + 1], from 0 to T.
        config: block sizes, counts and window.
        sliding_k: keys of the sliding branch, [T, H_kv, D_qk]; `k` if not given.
        sliding_v: values of the sliding branch, [T, H_kv, D_v]; `v` if not given.
        compress_k: keys that are summarised, [T, H_kv, D_qk]; `k` if not given.
        compress_v: values that are summarised, [T, H_kv, D_v]; `v` if not given.
        k_weights: the learned part of the key summaries; plain means if not given.
        v_weights: the learned part of the value summaries; plain means if not given.
        compressed_rotary: cosines and sines, each [C, R/2], that rotate the key summaries, for the positions of
            `packing.compressed_block_centres`; no rotation if not given.
        block_indices: int32 [T, H_kv, n], ascending then -1: attend to these blocks instead of ranking.
        scale: multiplies the scores, positive; D_qk ** -0.5 if not given.
        layout: `packing.batch_layout` of the batch, to share between layers; made here if not given. The Triton
            kernels alone read it.
        backend: `triton` needs a GPU, `eager` and `reference` are plain PyTorch; `auto` picks the fastest that takes
            the inputs.

    Returns:
        The output in q's dtype, [T, H, D_v], and the selected blocks.

    Raises:
        ValueError: shapes that disagree, an unknown backend, inputs that the chosen backend does not take; for
            `cu_seqlens` on the CPU also offsets that do not rise from 0 to T (on other devices they are not read).

    Source: arXiv:2502.11089, eq. 5-12.
    """
    sliding_k, sliding_v = (k if sliding_k is None else sliding_k), (v if sliding_v is None else sliding_v)
    compress_k, compress_v = (k if compress_k is None else compress_k), (v if compress_v is None else compress_v)
    _check_shapes(q, k, v, gates, sliding_k, sliding_v, compress_k, compress_v)
    _check_documents(cu_seqlens, len(q))
    slots = (len(q), k.shape[1], config.num_selected_blocks)
    if block_indices is not None and block_indices.shape != slots:
        raise SettingError(f"block_indices must be [T, H_kv, n], {slots} here, got {tuple(block_indices.shape)}")
    branches = Branches(k, v, sliding_k, sliding_v, compress_k, compress_v, k_weights, v_weights, compressed_rotary)
    chosen = plan(q, v, config, backend)
    with without_autocast(q):
        if chosen.backend == "reference":
            others = {"gates": gates, "cu_seqlens": cu_seqlens, "block_indices": block_indices, "scale": scale}
            return reference.native_sparse_attention(q, config=config, **branches._asdict(), **others)
        if chosen.backend == "eager":
            return eager.attend_branch_by_branch(q, branches, gates, cu_seqlens, config, block_indices, scale)
        from nsa_kernels.triton.attention import attend_all_branches

        layout = batch_layout(cu_seqlens, len(q), config) if layout is None else layout
        return attend_all_branches(q, branches, gates, config, block_indices, scale, layout, chosen.stages)


def _check_documents(cu_seqlens: Tensor, num_tokens: int) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        raise SettingError(f"cu_seqlens must be integers [N + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    if num_tokens < 1:
        raise SettingError(f"q must hold at least one token, got {num_tokens}")
    if readable(cu_seqlens):
        first, last, falls = int(cu_seqlens[0]), int(cu_seqlens[-1]), bool((cu_seqlens.diff() < 0).any())
        if first != 0 or last != num_tokens or falls:
            raise SettingError(f"cu_seqlens must rise from 0 to {num_tokens} tokens, got {cu_seqlens.tolist()}")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    sliding_k: Tensor,
    sliding_v: Tensor,
    compress_k: Tensor,
    compress_v: Tensor,
) -> None:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise SettingError(f"q, k and v must be [T, heads, head_dim], got {q.shape}, {k.shape} and {v.shape}")
    if q.shape[1] % k.shape[1]:
        raise SettingError(f"the query heads must be a multiple of the KV heads, got {q.shape[1]} and {k.shape[1]}")
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise SettingError(f"k must be [T, H_kv, D_qk] with q's T and D_qk, got {k.shape} for q {q.shape}")
    if v.shape[:2] != k.shape[:2]:
        raise SettingError(f"v must be [T, H_kv, D_v] with k's T and H_kv, got {v.shape} for k {k.shape}")
    if gates.shape != (*q.shape[:2], 3):
        raise SettingError(f"gates must be [T, H, 3] with q's T and H, got {gates.shape} for q {q.shape}")
    for name, x, like in (
        ("sliding_k", sliding_k, k),
        ("sliding_v", sliding_v, v),
        ("compress_k", compress_k, k),
        ("compress_v", compress_v, v),
    ):
        if x.shape != like.shape:
            raise SettingError(f"{name} must have the shape of {name[-1]}, got {x.shape} and {like.shape}")
