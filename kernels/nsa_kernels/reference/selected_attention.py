"""Stage 4: attend each query to the tokens of its chosen blocks (arXiv:2502.11089, eq. 5 and 12)."""
# T packed tokens, N documents, H query heads, H_kv key/value heads, G = H / H_kv heads in a group, D head dimension.
# t, s: positions in the document of a query and of a key; j selection block.

import torch
from torch import Tensor

from nsa_kernels.geometry import NSAConfig
from nsa_kernels.reference.documents import documents
from nsa_kernels.reference.softmax import attend_query, group_size_of, stack_queries


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
    H_kv, G, size = k.shape[1], group_size_of(q.shape[1], k.shape[1]), config.within(len(k)).select_block_size
    rows = []
    for start, end in documents(cu_seqlens):
        for t in range(end - start):
            heads = []
            for g in range(H_kv):
                blocks = [j for j in block_indices[start + t, g].tolist() if j >= 0]
                tokens = [start + s for j in blocks for s in range(j * size, (j + 1) * size) if s <= t]
                group = q[start + t, g * G : (g + 1) * G]  # [G, D_qk]
                heads.append(attend_query(group, k[tokens, g : g + 1], v[tokens, g : g + 1], scale))
            o, lse = zip(*heads, strict=True)
            rows.append((torch.cat(o), torch.cat(lse)))
    return stack_queries(rows)
