"""Native Sparse Attention written as its definition: slow, in any float type, differentiable (arXiv:2502.11089).

    out[t] = g_cmp[t] * o_cmp[t] + g_slc[t] * o_slc[t] + g_win[t] * o_win[t]

One document at a time, one query at a time; only heads and one query's keys are vectorised. Nothing is cast up, so
float64 in is float64 throughout. Every faster backend has these signatures and is compared with these functions.
"""

# T packed tokens, N documents, H query heads, H_kv key/value heads, G = H / H_kv heads in a group, D head dimension,
# C rows for compressed blocks, S keys that one query sees, J selection blocks of the longest document.
# t, s: positions in the document of a query and of a key; i compression block, j selection block, c chunk of d tokens.
# ruff: noqa: E741 - l is the paper's letter for the tokens of a compression block

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import silu

from nsa_kernels.errors import SettingError
from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput
from nsa_kernels.precision import contract
from nsa_kernels.rotary import apply_rotary


def compress(x: Tensor, cu_seqlens: Tensor, config: NSAConfig, weights: CompressionWeights | None = None) -> Tensor:
    """Summarise each complete block of keys or values in one.

        out_i = φ(x[i·d], …, x[i·d + l - 1]),   0 <= i < N_c(L)

    Args:
        x: keys before rotary embedding, or values, [T, H_kv, D].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        weights: the parameters of φ in x's dtype; None for the mean.

    Returns:
        [C, H_kv, D] in x's dtype with C = max(T // d, 1): document after document, block after block, then zeros.

    Source: arXiv:2502.11089, eq. 7.
    """
    l, d = config.compress_block_size, config.compress_stride
    summaries = [
        _summary(x[start + i * d : start + i * d + l], weights)
        for start, end in _documents(cu_seqlens)
        for i in range(_num_compressed_blocks(end - start, config))
    ]
    unused = max(len(x) // d, 1) - len(summaries)
    return torch.stack(summaries + unused * [torch.zeros_like(x[0])])  # [C, H_kv, D]


def compressed_attention(
    q: Tensor,
    compressed_k: Tensor,
    compressed_v: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the compression blocks that lie wholly in its past or present.

        o_t = Σ_i softmax_i(q_t · k̃_i · scale) ṽ_i   over   i·d + l - 1 <= t

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        compressed_v: block values, [C, H_kv, D_v].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        o [T, H, D_v] in q's dtype and lse [T, H], natural log, in float32 or q's dtype where that is wider. A query
        that sees no block has o = 0 and lse = 0, and passes no gradient on.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 5 and 7.
    """
    rows = []
    for start, end, first_block in _documents_with_blocks(cu_seqlens, config):
        for t in range(end - start):
            visible = [first_block + i for i in _visible_blocks(t, end - start, config)]
            rows.append(_attend(q[start + t], compressed_k[visible], compressed_v[visible], scale))
    return _stack(rows)


@torch.no_grad()
def block_importance(
    q: Tensor, compressed_k: Tensor, lse: Tensor, cu_seqlens: Tensor, config: NSAConfig, scale: float | None = None
) -> Tensor:
    """Score the selection blocks of each query by the compressed attention that falls on their chunks of d tokens.

        p_h[i] = exp(q_h · k̃_i · scale - lse_h)
        p_slc[j] = Σ_{h in group} Σ_{c = j·l'/d}^{(j+1)·l'/d - 1} Σ_{m = 0}^{l/d - 1} p_h[c - m]

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        lse: what `compressed_attention` returned, [T, H].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        The scores before ranking, [T, H_kv, J] in lse's dtype, without gradient, J = ceil(longest document / l');
        0 for blocks that do not exist and for blocks in the query's future.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 8-10.
    """
    config = config.within(len(q))
    l, d, select_size = config.compress_block_size, config.compress_stride, config.select_block_size
    T, H_kv = len(q), compressed_k.shape[1]
    J = max(math.ceil((end - start) / select_size) for start, end in _documents(cu_seqlens))
    importance = lse.new_zeros(T, H_kv, J)
    for start, end, first_block in _documents_with_blocks(cu_seqlens, config):
        for t in range(end - start):
            visible = [first_block + i for i in _visible_blocks(t, end - start, config)]
            scores = _scores(q[start + t], compressed_k[visible], scale)  # [H_kv, G, S]
            p = torch.exp(scores - lse[start + t].view(H_kv, -1, 1))  # [H_kv, G, S]
            for j in range(t // select_size + 1):
                for c in range(j * select_size // d, (j + 1) * select_size // d):
                    for m in range(l // d):
                        if 0 <= c - m < len(visible):
                            importance[start + t, :, j] += p[:, :, c - m].sum(1)
    return importance


@torch.no_grad()
def block_selection(
    q: Tensor, compressed_k: Tensor, lse: Tensor, cu_seqlens: Tensor, config: NSAConfig, scale: float | None = None
) -> Tensor:
    """Choose n selection blocks for each query and group of heads: the forced ones, then the most important.

        candidates: j·l' <= t;   forced: j < num_init_blocks, and t // l' - num_local_blocks < j <= t // l'

    Ties go to the lower index.

    Args:
        q: queries, [T, H, D_qk].
        compressed_k: block keys, [C, H_kv, D_qk], ordered as `compress` returns them.
        lse: what `compressed_attention` returned, [T, H].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes and counts.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        int32 [T, H_kv, n], ascending, then -1 in empty slots; indices are relative to the query's document.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 11.
    """
    importance = block_importance(q, compressed_k, lse, cu_seqlens, config, scale)
    T, H_kv, _ = importance.shape
    block_indices = torch.full((T, H_kv, config.num_selected_blocks), -1, dtype=torch.int32, device=q.device)
    for start, end in _documents(cu_seqlens):
        for t in range(end - start):
            own = t // config.select_block_size
            candidates = range(own + 1)
            forced = [j for j in candidates if j < config.num_init_blocks or j > own - config.num_local_blocks]
            for g in range(H_kv):
                score = importance[start + t, g].tolist()
                ranked = sorted((j for j in candidates if j not in forced), key=lambda j: (-score[j], j))
                chosen = sorted((forced + ranked)[: config.num_selected_blocks])
                block_indices[start + t, g, : len(chosen)] = torch.tensor(chosen)
    return block_indices


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor,
    config: NSAConfig,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend each query to the tokens of its chosen blocks, up to and including itself.

        o_t = Σ_s softmax_s(q_t · k_s · scale) v_s   over   s // l' in block_indices[t], s <= t

    Args:
        q: queries, [T, H, D_qk].
        k: keys, [T, H_kv, D_qk].
        v: values, [T, H_kv, D_v].
        block_indices: int32 [T, H_kv, n], -1 for none; relative to the query's document, none twice.
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        o [T, H, D_v] in q's dtype and lse [T, H], natural log, in float32 or q's dtype where that is wider.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 5 and 12.
    """
    H_kv, G, size = k.shape[1], _group_size(q.shape[1], k.shape[1]), config.within(len(k)).select_block_size
    rows = []
    for start, end in _documents(cu_seqlens):
        for t in range(end - start):
            heads = []
            for g in range(H_kv):
                blocks = [j for j in block_indices[start + t, g].tolist() if j >= 0]
                tokens = [start + s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]
                group = q[start + t, g * G : (g + 1) * G]  # [G, D_qk]
                heads.append(_attend(group, k[tokens, g : g + 1], v[tokens, g : g + 1], scale))
            o, lse = zip(*heads, strict=True)
            rows.append((torch.cat(o), torch.cat(lse)))
    return _stack(rows)


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window_size: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend each query to itself and the w - 1 tokens before it.

        o_t = Σ_s softmax_s(q_t · k_s · scale) v_s   over   t - w < s <= t

    Args:
        q: queries, [T, H, D_qk].
        k: keys, [T, H_kv, D_qk].
        v: values, [T, H_kv, D_v].
        cu_seqlens: document offsets, int32 [N + 1].
        window_size: tokens that a query sees (w), itself included.
        scale: factor of the scores, 1 / sqrt(D_qk) by default.

    Returns:
        o [T, H, D_v] in q's dtype and lse [T, H], natural log, in float32 or q's dtype where that is wider.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, sec. 3.3.3.
    """
    rows = []
    for start, end in _documents(cu_seqlens):
        for t in range(end - start):
            tokens = [start + s for s in range(end - start) if t - window_size < s <= t]
            rows.append(_attend(q[start + t], k[tokens], v[tokens], scale))
    return _stack(rows)


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
) -> NSAOutput:
    """Sum the compressed, the selected and the sliding branch, each through its gate.

        out[t] = g_cmp[t] * o_cmp[t] + g_slc[t] * o_slc[t] + g_win[t] * o_win[t]

    Args:
        q: queries, [T, H, D_qk]; head h belongs to KV head h // G.
        k: keys of the selected branch, [T, H_kv, D_qk].
        v: values of the selected branch, [T, H_kv, D_v].
        gates: weights in (0, 1) of the compressed, selected and sliding branch, [T, H, 3].
        cu_seqlens: document offsets, int32 [N + 1].
        config: block sizes, counts and window.
        sliding_k: keys of the sliding branch, [T, H_kv, D_qk]; `k` by default.
        sliding_v: values of the sliding branch, [T, H_kv, D_v]; `v` by default.
        compress_k: keys to compress, [T, H_kv, D_qk]; `k` by default.
        compress_v: values to compress, [T, H_kv, D_v]; `v` by default.
        k_weights: φ of the keys; None for the mean.
        v_weights: φ of the values; None for the mean.
        compressed_rotary: (cos, sin), each [C, R/2], the angles at which the compressed keys are rotated, one row a
            block; None for no rotation.
        block_indices: int32 [T, H_kv, n], attended to instead of the blocks that ranking would choose.
        scale: factor of the scores of every branch, 1 / sqrt(D_qk) by default.

    Returns:
        out [T, H, D_v] in q's dtype, and the block indices that the selected branch attended to.

    Raises:
        ValueError: H is not a multiple of H_kv.

    Source: arXiv:2502.11089, eq. 5.
    """
    sliding_k, sliding_v = k if sliding_k is None else sliding_k, v if sliding_v is None else sliding_v
    compress_k, compress_v = k if compress_k is None else compress_k, v if compress_v is None else compress_v

    compressed_k = compress(compress_k, cu_seqlens, config, k_weights)  # [C, H_kv, D_qk]
    compressed_v = compress(compress_v, cu_seqlens, config, v_weights)  # [C, H_kv, D_v]
    if compressed_rotary is not None:
        compressed_k = apply_rotary(compressed_k, *compressed_rotary)

    compressed, lse = compressed_attention(q, compressed_k, compressed_v, cu_seqlens, config, scale)
    if block_indices is None:
        block_indices = block_selection(q, compressed_k, lse, cu_seqlens, config, scale)
    selected, _ = selected_attention(q, k, v, block_indices, cu_seqlens, config, scale)
    sliding, _ = sliding_attention(q, sliding_k, sliding_v, cu_seqlens, config.window_size, scale)

    g_cmp, g_slc, g_win = gates.unsqueeze(-1).unbind(2)  # each [T, H, 1]
    return NSAOutput(g_cmp * compressed + g_slc * selected + g_win * sliding, block_indices)


def _documents(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    """First token and end of each document."""
    return pairwise(cu_seqlens.tolist())


def _documents_with_blocks(cu_seqlens: Tensor, config: NSAConfig) -> Iterator[tuple[int, int, int]]:
    """First token, end and first compressed row of each document."""
    first_block = 0
    for start, end in _documents(cu_seqlens):
        yield start, end, first_block
        first_block += _num_compressed_blocks(end - start, config)


def _num_compressed_blocks(length: int, config: NSAConfig) -> int:
    """N_c(L) = (L - l) // d + 1 for L >= l, else 0."""
    l, d = config.compress_block_size, config.compress_stride
    return (length - l) // d + 1 if length >= l else 0


def _visible_blocks(t: int, length: int, config: NSAConfig) -> list[int]:
    """The compression blocks that lie wholly in the past or present of query t."""
    l, d = config.compress_block_size, config.compress_stride
    return [i for i in range(_num_compressed_blocks(length, config)) if i * d + l - 1 <= t]


def _summary(x: Tensor, weights: CompressionWeights | None) -> Tensor:
    """φ(x) = mean(x) + f(x + e), head by head: x [l, H_kv, D] -> [H_kv, D]."""
    mean = x.mean(0)
    if weights is None:
        return mean
    u = (x.transpose(0, 1) + weights.position_embedding).flatten(1)  # [H_kv, l * D], token by token
    y = contract("hi,him->hm", u, weights.in_weight) + weights.in_bias  # [H_kv, M]
    if weights.out_weight is not None and weights.out_bias is not None:
        y = contract("hm,hmd->hd", silu(y), weights.out_weight) + weights.out_bias
    return (mean + y).to(x.dtype)


def _group_size(num_heads: int, num_kv_heads: int) -> int:
    """G = H / H_kv."""
    if num_heads % num_kv_heads:
        raise SettingError(f"query heads must be a multiple of key/value heads, got {num_heads} and {num_kv_heads}")
    return num_heads // num_kv_heads


def _scores(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """q_h · k_s · scale of one query: q [H, D_qk], k [S, H_kv, D_qk] -> [H_kv, G, S]."""
    (H, D_qk), H_kv = q.shape, k.shape[1]
    grouped = q.view(H_kv, _group_size(H, H_kv), D_qk)  # head h belongs to KV head h // G
    return contract("kgd,skd->kgs", grouped, k) * (D_qk**-0.5 if scale is None else scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """One query over all the keys it sees: q [H, D_qk], k and v [S, H_kv, D] -> o [H, D_v], lse [H].

    With no key (S = 0) the sum is empty, so o = 0, and lse is 0 by definition.
    """
    scores = _scores(q, k, scale)  # [H_kv, G, S]
    o = contract("kgs,skd->kgd", scores.softmax(-1), v).flatten(0, 1)  # [H, D_v]
    lse = (scores.logsumexp(-1) if len(k) else scores.sum(-1)).flatten()  # [H]
    return o, lse.to(torch.promote_types(lse.dtype, torch.float32))


def _stack(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One (o, lse) a query -> o [T, H, D_v], lse [T, H]."""
    o, lse = zip(*rows, strict=True)
    return torch.stack(o), torch.stack(lse)
