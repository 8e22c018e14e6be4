"""The operator at a few queries of a batch too long for the reference, each computed densely from its definition."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from nsa_kernels.geometry import NSAConfig
from nsa_kernels.packing import batch_layout
from torch import Tensor
from torch.nn.functional import pad

from support.packings import Inputs


class Row(NamedTuple):
    """One query and what it may see."""

    query: Tensor  # [H_kv, G, D]
    document: slice
    position: int
    summaries: slice


def _rows(q: Tensor, num_kv_heads: int, offsets: Tensor, config: NSAConfig, tokens: list[int]) -> Iterator[Row]:
    layout = batch_layout(offsets, len(q), config)
    for t in tokens:
        start, first, end = (int(x[t]) for x in (layout.document_start, layout.first_summary, layout.end_summary))
        yield Row(q[t].double().unflatten(0, (num_kv_heads, -1)), slice(start, t + 1), t - start, slice(first, end))


def _softmax_sum(row: Row, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one query to keys [S, H_kv, D] and values [S, H_kv, D_v], [H, D_v]; zeros without a key."""
    scores = torch.einsum("kgd,skd->kgs", row.query, k.double()) * row.query.shape[-1] ** -0.5
    return torch.einsum("kgs,skd->kgd", scores.softmax(-1), v.double()).flatten(0, 1)


@torch.no_grad()
def dense_rows(
    inputs: Inputs, summary_k: Tensor, summary_v: Tensor, block_indices: Tensor, config: NSAConfig, tokens: list[int]
) -> Tensor:
    """The output at `tokens`, float64 [len(tokens), H, D_v], from given summaries and chosen blocks."""
    k, v, sliding_k, sliding_v = inputs.k, inputs.v, inputs.sliding_k, inputs.sliding_v
    sliding_k, sliding_v = (k if sliding_k is None else sliding_k), (v if sliding_v is None else sliding_v)
    H_kv, size, out = k.shape[1], config.select_block_size, []
    for t, row in zip(tokens, _rows(inputs.q, H_kv, inputs.cu_seqlens, config, tokens), strict=True):
        seen = row.summaries
        window = slice(max(row.document.start, t - config.window_size + 1), t + 1)
        heads = []
        for g in range(H_kv):
            blocks = [j for j in block_indices[t, g].tolist() if j >= 0]
            positions = [s for j in blocks for s in range(j * size, min((j + 1) * size, row.position + 1))]
            keys = torch.tensor(positions, device=k.device) + row.document.start
            alone = row._replace(query=row.query[g : g + 1])
            heads.append(_softmax_sum(alone, k[keys, g : g + 1], v[keys, g : g + 1]))
        branches = [
            _softmax_sum(row, summary_k[seen], summary_v[seen]),
            torch.cat(heads),
            _softmax_sum(row, sliding_k[window], sliding_v[window]),
        ]
        out.append((inputs.gates[t].double().unsqueeze(-1) * torch.stack(branches, 1)).sum(1))
    return torch.stack(out)


@torch.no_grad()
def importance_of_rows(q: Tensor, summary_k: Tensor, offsets: Tensor, config: NSAConfig, tokens: list[int]) -> Tensor:
    """Importance of the selection blocks at `tokens`, float64 [len(tokens), H_kv, J] on the CPU."""
    H_kv = summary_k.shape[1]
    per_block = config.select_block_size // config.compress_stride
    per_summary = config.compress_block_size // config.compress_stride
    J = (int(offsets.diff().max()) - 1) // config.select_block_size + 1
    out = torch.zeros(len(tokens), H_kv, J, dtype=torch.float64)
    for i, row in enumerate(_rows(q, H_kv, offsets, config, tokens)):
        keys = summary_k[row.summaries].double()
        if len(keys) == 0:
            continue
        scores = torch.einsum("kgd,skd->kgs", row.query, keys) * row.query.shape[-1] ** -0.5
        p = scores.softmax(-1).sum(1)  # [H_kv, S]
        chunks = sum(pad(p, (m, per_summary - 1 - m)) for m in range(per_summary))  # summary i covers chunks i + m
        own = row.position // config.select_block_size
        chunks = pad(chunks, (0, per_block * (own + 2)))[:, : per_block * (own + 1)]
        out[i, :, : own + 1] = chunks.unflatten(1, (-1, per_block)).sum(-1).cpu()
    return out
