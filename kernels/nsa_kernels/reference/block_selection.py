"""Stage 3: choose for each query and group of heads the blocks it attends to (arXiv:2502.11089, eq. 8-11)."""
# T packed tokens, N documents, H query heads, H_kv key/value heads, D head dimension, C rows for compressed blocks,
# S compressed keys that one query sees, J selection blocks of the longest document.
# t: position of a query in its document; i compression block, j selection block, c chunk of d tokens.
# ruff: noqa: E741 - l is the paper's letter for the tokens of a compression block

import math

import torch
from torch import Tensor

from nsa_kernels.geometry import NSAConfig
from nsa_kernels.reference.documents import documents, documents_with_blocks, visible_blocks
from nsa_kernels.reference.softmax import scores_of


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
    J = max(math.ceil((end - start) / select_size) for start, end in documents(cu_seqlens))
    importance = lse.new_zeros(T, H_kv, J)
    for start, end, first_block in documents_with_blocks(cu_seqlens, config):
        for t in range(end - start):
            visible = [first_block + i for i in visible_blocks(t, end - start, config)]
            scores = scores_of(q[start + t], compressed_k[visible], scale)  # [H_kv, G, S]
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
    for start, end in documents(cu_seqlens):
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
