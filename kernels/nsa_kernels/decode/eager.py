"""Attention to a cache in plain PyTorch: what a CPU generates with, and any device without Triton.

Sequences are independent: query t of sequence s stands at a position of its own and reads keys of its own. Scores and
sums are computed in float32 (float64 for float64 inputs), a chunk of queries at a time.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.eager.block_selection import Candidates, rank
from nsa_kernels.eager.compress import summarise
from nsa_kernels.eager.softmax import attend
from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput
from nsa_kernels.precision import linear_map
from nsa_kernels.rotary import apply_rotary

# B sequences, T queries of each, H query heads, H_kv KV heads, G = H / H_kv, D head dim, S keys, C summaries, n chosen
# blocks of l' tokens, J blocks to choose from.

_CHUNK_BYTES = 2**23
"""Size of the keys and values that a chunk of queries gathers: what a CPU caches."""


class Keys(NamedTuple):
    """Keys and values of every sequence, and which token each of them is."""

    k: Tensor  # [B, S, H_kv, D_qk]
    v: Tensor  # [B, S, H_kv, D_v]
    tokens: Tensor  # int64 [B, S], negative where there is none


def advance_blocks(new: Any, summaries: tuple[Tensor, Tensor], positions: Tensor, config: NSAConfig) -> None:
    """Summarise the block that a `decode.NewToken` completes, the token being in its ring, and carry the others on."""
    l, d, position = config.compress_block_size, config.compress_stride, positions.long()  # noqa: E741
    first = position + 1 - l
    block, ends = first.clamp(min=0) // d, (first >= 0) & (first % d == 0)
    (B, *_), device, ring = positions.shape, positions.device, (new.compressed.k_slots, new.compressed.v_slots)
    sequence, slots = torch.arange(B, device=device), (block[:, None] * d + torch.arange(l, device=device)) % l
    k, v = map(summarise, (x[sequence[:, None], slots] for x in ring), new.weights or (None, None))
    k = k if new.block_rotary is None else apply_rotary(k, *new.block_rotary)
    for target, summary in zip(summaries, (k, v), strict=True):
        target[sequence, block] = summary.where(ends[:, None, None], target[sequence, block])
    for target, sums in zip(new.started, started_blocks(ring, position, config, new.weights), strict=True):
        target.copy_(sums)


def started_blocks(
    ring: tuple[Tensor, Tensor],
    position: Tensor,
    config: NSAConfig,
    weights: tuple[CompressionWeights, CompressionWeights] | None,
) -> tuple[Tensor, ...]:
    """What a `decode.StartedBlocks` holds after the tokens up to `position`, int64 [B]; of rings [B, l, H_kv, D]."""
    l, d, device = config.compress_block_size, config.compress_stride, position.device  # noqa: E741
    slot = torch.arange(l // d, device=device)
    block = position[:, None] // d - (position[:, None] // d - slot) % (l // d)  # [B, S], the last one of each slot
    token = block[:, :, None] * d + torch.arange(l, device=device)  # [B, S, l]
    seen = ((block[:, :, None] >= 0) & (token <= position[:, None, None]))[..., None, None]
    sequence = torch.arange(len(position), device=device)[:, None, None]
    sums, maps = [], []
    for x, learned in zip(ring, weights or (None, None), strict=True):
        tokens = x[sequence, token % l]  # [B, S, l, H_kv, D]
        sums.append(tokens.where(seen, 0.0).sum(2, dtype=torch.float32))
        if learned is None:
            maps.append(sums[-1][..., :0])
        else:
            inputs = (tokens + learned.position_embedding.transpose(0, 1)).where(seen, 0.0)
            inputs = inputs.transpose(2, 3).flatten(3).flatten(0, 1).transpose(0, 1)  # [H_kv, B * S, l * D]
            mapped = linear_map(inputs, learned.in_weight).transpose(0, 1)
            maps.append(mapped.float().contiguous().unflatten(0, block.shape))
    return *sums, *maps


def attend_cache(
    q: Tensor,
    gates: Tensor,
    positions: Tensor,
    selected: tuple[Tensor, Tensor],
    sliding: Keys,
    summaries: tuple[Tensor, Tensor],
    config: NSAConfig,
    scale: float,
) -> NSAOutput:
    """The gated sum of the branches; queries [B, T, H, D_qk] at int64 positions [B, T], blocks int32 [B, T, H_kv, n].

    Selected keys and values [B, S, H_kv, D] hold token t in slot t, summaries block i in row i. Of several queries the
    sliding keys are in order, the last of them the last query's own.
    """
    num_kv_heads, num_blocks = sliding.k.shape[2], -(-selected[0].shape[1] // config.select_block_size)
    chunk = _chunk_size(q, selected, min(num_blocks, config.num_selected_blocks) * config.select_block_size)
    outs, chosen = [], []
    for start in range(0, q.shape[1], chunk):
        rows = slice(start, start + chunk)
        heads = _by_group(q[:, rows], num_kv_heads) * scale  # [B, H_kv, t, G, D]
        compressed_o, importance = _compressed(heads, positions[:, rows], *summaries, num_blocks, config)
        blocks = _choose(importance, positions[:, rows], config)
        selected_o = _selected(heads, positions[:, rows], *selected, blocks[..., :num_blocks], config)
        near = _near(sliding, rows, q.shape[1], config.window_size) if q.shape[1] > 1 else sliding
        sliding_o = _seen(heads, positions[:, rows], near, config.window_size)
        weights = gates[:, rows].to(heads.dtype).unsqueeze(-1).unbind(3)  # 3 × [B, t, H, 1]
        branches = zip(weights, (compressed_o, selected_o, sliding_o), strict=True)
        outs.append(sum((gate * _by_head(o) for gate, o in branches), start=torch.zeros(())).to(q.dtype))
        chosen.append(blocks)
    return NSAOutput(torch.cat(outs, 1), torch.cat(chosen, 1))


def attend_cache_densely(q: Tensor, positions: Tensor, keys: Keys, window_size: int | None, scale: float) -> Tensor:
    """Causal attention of queries [B, T, H, D_qk] at int64 positions [B, T] to all keys, or those in a window."""
    heads = _by_group(q, keys.k.shape[2]) * scale
    return _by_head(_seen(heads, positions, keys, window_size)).to(q.dtype)


def _chunk_size(q: Tensor, selected: tuple[Tensor, Tensor], tokens: int) -> int:
    """Queries whose keys are gathered at a time, `tokens` for each."""
    k, v = selected
    return max(1, _CHUNK_BYTES // (4 * len(q) * k.shape[2] * tokens * (k.shape[3] + v.shape[3])))


def _by_group(q: Tensor, num_kv_heads: int) -> Tensor:
    """[B, T, H, D] -> [B, H_kv, T, G, D], in float32 at least."""
    q = q.unflatten(2, (num_kv_heads, -1)).transpose(1, 2)
    return q.to(torch.promote_types(q.dtype, torch.float32))


def _by_head(o: Tensor) -> Tensor:
    """[B, H_kv, T, G, D] -> [B, T, H, D]."""
    return o.transpose(1, 2).flatten(2, 3)


def _compressed(
    q: Tensor, positions: Tensor, summary_k: Tensor, summary_v: Tensor, num_blocks: int, config: NSAConfig
) -> tuple[Tensor, Tensor]:
    """o of the compressed branch, and the importance of every selection block, [B, H_kv, T, J]; J is `num_blocks`."""
    l, d = config.compress_block_size, config.compress_stride  # noqa: E741
    k, v = (x.transpose(1, 2).to(q.dtype) for x in (summary_k, summary_v))  # [B, H_kv, C, D]
    visible = torch.arange(k.shape[2], device=q.device) * d + l - 1 <= positions[..., None]  # [B, T, C]
    hidden = ~visible[:, None, :, None]
    scores = torch.einsum("bhtgd,bhcd->bhtgc", q, k).masked_fill(hidden, float("-inf"))
    p = scores.softmax(-1).masked_fill(hidden, 0.0)  # a query that sees no block has 0, not NaN
    per_block, per_summary = config.select_block_size // d, l // d
    width = per_block + per_summary - 1
    offset = torch.arange(width, device=q.device)
    weights = torch.minimum(offset, width - 1 - offset).add(1).clamp(max=min(per_block, per_summary))
    padded = F.pad(p.sum(3), (per_summary - 1, num_blocks * per_block - k.shape[2]))
    return torch.einsum("bhtgc,bhcd->bhtgd", p, v), padded.unfold(-1, width, per_block) @ weights.to(p.dtype)


def _choose(importance: Tensor, positions: Tensor, config: NSAConfig) -> Tensor:
    """The n blocks of each query, int32 [B, T, H_kv, n]."""
    own = positions.flatten() // config.select_block_size
    blocks = torch.arange(importance.shape[-1], device=own.device)
    by_query = importance.transpose(0, 1).flatten(1, 2)  # [H_kv, B · T, J]
    return rank(by_query, Candidates(blocks, torch.zeros_like(own), own), config).unflatten(0, positions.shape)


def _selected(q: Tensor, positions: Tensor, k: Tensor, v: Tensor, blocks: Tensor, config: NSAConfig) -> Tensor:
    size = config.select_block_size
    tokens = blocks.long().unsqueeze(-1) * size + torch.arange(size, device=q.device)  # [B, T, H_kv, n, l']
    hidden = (blocks.unsqueeze(-1) < 0) | (tokens > positions[:, :, None, None, None])
    tokens, hidden = (x.flatten(3).transpose(1, 2) for x in (tokens.clamp(0, k.shape[1] - 1), hidden))
    sequence = torch.arange(len(q), device=q.device)[:, None, None, None]
    head = torch.arange(q.shape[1], device=q.device)[:, None, None]
    rows = ((sequence * k.shape[1] + tokens) * q.shape[1] + head).flatten()
    k, v = (x.flatten(0, 2).index_select(0, rows).view(*tokens.shape, -1).to(q.dtype) for x in (k, v))
    return _softmax_attention(q, k, v, hidden.unsqueeze(3))


def _near(keys: Keys, queries: slice, num_queries: int, window_size: int) -> Keys:
    """The keys that some queries of a chunk may see, out of those of the whole chunk."""
    before = keys.k.shape[1] - num_queries
    return Keys(*(x[:, max(before + queries.start + 1 - window_size, 0) : before + queries.stop] for x in keys))


def _seen(q: Tensor, positions: Tensor, keys: Keys, window_size: int | None) -> Tensor:
    tokens, query = keys.tokens[:, None, :], positions[:, :, None]  # [B, 1, S], [B, T, 1]
    seen = (tokens >= 0) & (tokens <= query)
    if window_size is not None:
        seen &= tokens > query - window_size
    k, v = (x.transpose(1, 2).unsqueeze(2).to(q.dtype) for x in (keys.k, keys.v))  # [B, H_kv, 1, S, D]
    return _softmax_attention(q, k, v, ~seen[:, None, :, None])


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """q [B, H_kv, T, G, D], k and v [B, H_kv, T or 1, N, D], hidden broadcasts to [B, H_kv, T, G, N]."""
    if k.shape[2] == 1 and q.shape[2] > 1:  # the same keys for every query: one matrix product for all of them
        hidden = hidden.expand(*q.shape[:4], -1).flatten(2, 3)
        return _softmax_attention(q.flatten(2, 3).unsqueeze(2), k, v, hidden.unsqueeze(2)).view(*q.shape[:4], -1)
    shape = (*q.shape[:4], k.shape[3])
    o, _ = attend(
        q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2), hidden.expand(shape).flatten(0, 2)
    )  # [B · H_kv · T, G, D]
    return o.unflatten(0, q.shape[:3])
