"""Attention of new tokens to what is cached: one token of each sequence, or the next chunk of one sequence.

The same function of the whole sequence as `native_sparse_attention`, token by token, without its backward. A step
reads the summaries, n selected blocks and the window, whatever the length of the sequence.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nsa_kernels.backends import Backend, plan
from nsa_kernels.decode.eager import Keys, advance_blocks, attend_cache, attend_cache_densely
from nsa_kernels.errors import SettingError
from nsa_kernels.geometry import CompressionWeights, NSAConfig, NSAOutput
from nsa_kernels.precision import computed_as_given
from nsa_kernels.rotary import apply_rotary

# B sequences, S and W slots, C rows, T new tokens of a chunk, L tokens so far, H query heads, H_kv KV heads, n blocks.


class LayerCache(NamedTuple):
    """Keys and values of B sequences in one NSA layer.

    Slots and rows past a sequence's tokens count for nothing, but must be finite: a new cache holds zeros.
    """

    k: Tensor  # [B, S, H_kv, D_qk], selected branch, rotated; token t in slot t
    v: Tensor  # [B, S, H_kv, D_v]
    sliding_k: Tensor  # [B, W, H_kv, D_qk], W >= window_size, token t in slot t % W; `k` where the branches share
    sliding_v: Tensor  # [B, W, H_kv, D_v]
    summary_k: Tensor  # [B, C, H_kv, D_qk], compression block i in row i, rotated; C >= S // compress_stride
    summary_v: Tensor  # [B, C, H_kv, D_v]


class NewTokens(NamedTuple):
    """Keys and values of one new token of each sequence, and where they go."""

    k: Tensor  # [B, H_kv, D_qk]
    v: Tensor  # [B, H_kv, D_v]
    k_slots: Tensor  # [B, S, H_kv, D_qk], written: token t in slot t % S
    v_slots: Tensor  # [B, S, H_kv, D_v]
    rotate: bool  # whether the key takes its position before


class StartedBlocks(NamedTuple):
    """Sums over the tokens so far of the compression blocks that have started and not ended; block i in slot i % S.

    There are S = l / d slots. What a slot holds counts for nothing before a block starts in it.
    """

    k_sum: Tensor  # float32 [B, S, H_kv, D_qk]
    v_sum: Tensor  # float32 [B, S, H_kv, D_v]
    k_mapped: Tensor  # float32 [B, S, H_kv, M], what the learned map's input layer gives; M is 0 for the mean
    v_mapped: Tensor  # float32 [B, S, H_kv, M]


class NewToken(NamedTuple):
    """One new token of each sequence on its way into the cache of an NSA layer."""

    branches: Sequence[NewTokens]  # of the selected branch, and of the sliding one where it has its own
    compressed: NewTokens  # of the compressed branch, into rings of the last l tokens
    started: StartedBlocks  # carried on
    weights: tuple[CompressionWeights, CompressionWeights] | None  # of summaries of keys and values; None: the mean
    rotary: tuple[Tensor, Tensor]  # cosines and sines of the token's position, [B, R/2]
    block_rotary: tuple[Tensor, Tensor] | None  # what the key summary of a block that ends with it is rotated by


@torch.no_grad()
@computed_as_given
def append_tokens(
    q: Tensor,
    pairs: Sequence[NewTokens],
    positions: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Rotate the queries and keys of one new token of each sequence and write its keys and values to their slots.

    Args:
        q: queries before their rotation, [B, H, D_qk].
        pairs: keys and values of every branch, in the dtype of their slots.
        positions: position of the new token in its sequence, int32 [B].
        rotary: cosines and sines of the positions, [B, R/2] each.
        backend: as in `native_sparse_attention`.

    Returns:
        The rotated queries, [B, H, D_qk].

    Raises:
        ValueError: shapes or dtypes that disagree.
    """
    _check_new(pairs, len(q))
    _check("positions", positions, (len(q),))
    if pairs and plan(q, pairs[0].v, None, backend).backend == "triton":
        from nsa_kernels.decode.append import launch_append

        return launch_append(q, pairs, positions, *rotary)
    sequence = torch.arange(len(q), device=q.device)
    for new in pairs:
        slot = positions.long() % new.k_slots.shape[1]
        new.k_slots[sequence, slot] = apply_rotary(new.k, *rotary) if new.rotate else new.k
        new.v_slots[sequence, slot] = new.v
    return apply_rotary(q, *rotary)


@torch.no_grad()
@computed_as_given
def decode_attention(
    q: Tensor,
    gates: Tensor,
    cache: LayerCache,
    positions: Tensor,
    config: NSAConfig,
    *,
    new: NewToken | None = None,
    scale: float | None = None,
    gate_logits: bool = False,
    backend: Backend = "auto",
) -> NSAOutput:
    """Attend one new token of each sequence to its cache, which holds the token's own keys and values or gets them.

    No value is read back to the host and shapes do not depend on the positions: fit for a CUDA graph.

    Args:
        q: queries, [B, H, D_qk], with their position applied unless `new` is given; may be part of a wider tensor.
        gates: branch weights, [B, H, 3]: compressed, selected, sliding; may be part of a wider tensor.
        cache: keys, values and every summary that is complete with the new token.
        positions: position of the new token in its sequence, int32 [B].
        config: block sizes, counts and window.
        new: the token's keys and values before rotation, which are written to the cache first, with the summary of the
            compression block that it completes. The cache has to hold them already if not given.
        scale: multiplies the scores, positive; D_qk ** -0.5 if not given.
        gate_logits: whether `gates` holds logits, whose sigmoid is the weight.
        backend: as in `native_sparse_attention`; `reference` runs the eager one.

    Returns:
        The output in q's dtype, [B, H, D_v], and the selected blocks, int32 [B, H_kv, n].

    Raises:
        ValueError: shapes that disagree, or inputs that the chosen backend does not take.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    config = config.within(cache.k.shape[1]) if new is None else config
    B, H_KV = len(q), cache.k.shape[2]
    _check("q", q, (B, H_KV * (q.shape[1] // H_KV), cache.k.shape[3]))
    _check("gates", gates, (*q.shape[:2], 3))
    _check("positions", positions, (B,))
    _check_pairs(cache, B)
    if new is not None:
        _check_new_token(new, cache, config)
    if cache.sliding_k.shape[1] < config.window_size and cache.sliding_k.shape[1] < cache.k.shape[1]:
        raise SettingError(
            f"sliding_k must have at least window_size slots, {config.window_size}, got {cache.sliding_k.shape[1]}"
        )
    if cache.summary_k.shape[1] < cache.k.shape[1] // config.compress_stride:
        raise SettingError(
            "summary_k must have a row for every compress_stride slots of k, "
            f"{cache.k.shape[1] // config.compress_stride}, got {cache.summary_k.shape[1]}"
        )
    if cache.k.shape[1] % config.select_block_size:
        raise SettingError(
            f"k must have a multiple of select_block_size slots, {config.select_block_size}, got {cache.k.shape[1]}"
        )
    if plan(q, cache.v, config, backend).backend == "triton":
        from nsa_kernels.decode.step import attend_step

        contiguous = [x.contiguous() for x in cache]
        return attend_step(q, gates, gate_logits, contiguous, positions, config, scale, new)
    if new is not None:
        q = append_tokens(q, [*new.branches, new.compressed], positions, new.rotary, backend=backend)
        advance_blocks(new, (cache.summary_k, cache.summary_v), positions, config)
    gates = gates.sigmoid() if gate_logits else gates
    position = positions.long().unsqueeze(1)
    cache = LayerCache(*_used(cache, positions, config))
    sliding = Keys(cache.sliding_k, cache.sliding_v, _ring_tokens(position, cache.sliding_k.shape[1]))
    selected, summaries = (cache.k, cache.v), (cache.summary_k, cache.summary_v)
    out, blocks = attend_cache(
        q.unsqueeze(1), gates.unsqueeze(1), position, selected, sliding, summaries, config, scale
    )
    return NSAOutput(out.squeeze(1), blocks.squeeze(1))


@torch.no_grad()
@computed_as_given
def decode_dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    window_size: int | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attend one new token of each sequence to all its tokens, or to the last ones, its own included.

    Args:
        q: queries with their position applied, [B, H, D_qk].
        k: keys, [B, S, H_kv, D_qk], token t in slot t; with a window in slot t % S.
        v: values, [B, S, H_kv, D_v].
        positions: position of the new token in its sequence, int32 [B].
        window_size: tokens that are seen; all if not given.
        scale: multiplies the scores, positive; D_qk ** -0.5 if not given.
        backend: as in `native_sparse_attention`.

    Returns:
        [B, H, D_v] in q's dtype.

    Raises:
        ValueError: shapes that disagree, or inputs that the chosen backend does not take.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, S, H_KV = k.shape[:3]
    _check("q", q, (B, H_KV * (q.shape[1] // H_KV), k.shape[3]))
    _check("v", v, (B, S, H_KV, v.shape[3]))
    _check("positions", positions, (B,))
    if plan(q, v, None, backend).backend == "triton":
        from nsa_kernels.decode.parts import launch_dense_attention

        contiguous = q.contiguous(), k.contiguous(), v.contiguous()
        return launch_dense_attention(*contiguous, positions, window_size, scale)
    position, S = positions.long().unsqueeze(1), _used_slots(S, positions)
    k, v = k[:, :S], v[:, :S]
    tokens = _ring_tokens(position, S) if window_size is not None else torch.arange(S, device=q.device).expand(B, S)
    out = attend_cache_densely(q.unsqueeze(1), position, Keys(k, v, tokens), window_size, scale)
    return out.squeeze(1)


@torch.no_grad()
@computed_as_given
def chunk_attention(
    q: Tensor,
    gates: Tensor,
    k: Tensor,
    v: Tensor,
    sliding_k: Tensor,
    sliding_v: Tensor,
    summary_k: Tensor,
    summary_v: Tensor,
    config: NSAConfig,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> NSAOutput:
    """Attend the last T tokens of one document to all of it, as `native_sparse_attention` would.

    Args:
        q: queries with their position applied, [T, H, D_qk].
        gates: branch weights, [T, H, 3]: compressed, selected, sliding.
        k: keys of the selected branch, of all L tokens, [L, H_kv, D_qk].
        v: values of the selected branch, [L, H_kv, D_v].
        sliding_k: keys of the sliding branch, of the last tokens, at least min(L, T + window_size - 1) of them.
        sliding_v: values of the sliding branch, as many.
        summary_k: rotated key of each compression block, [C, H_kv, D_qk]; rows past the last complete block are unread.
        summary_v: value of each compression block, [C, H_kv, D_v].
        config: block sizes, counts and window.
        scale: multiplies the scores, positive; D_qk ** -0.5 if not given.
        backend: as in `native_sparse_attention`; `reference` runs the eager one.

    Returns:
        The output in q's dtype, [T, H, D_v], and the selected blocks, int32 [T, H_kv, n].

    Raises:
        ValueError: shapes that disagree, or inputs that the chosen backend does not take.
    """
    scale, config = q.shape[-1] ** -0.5 if scale is None else scale, config.within(len(k))
    (T, H, _), (L, H_KV, D_QK), M = q.shape, k.shape, len(sliding_k)
    _check("q", q, (T, H_KV * (H // H_KV), D_QK))
    _check("gates", gates, (T, H, 3))
    _check_pairs(LayerCache(*(x.unsqueeze(0) for x in (k, v, sliding_k, sliding_v, summary_k, summary_v))), 1)
    if not T <= L or min(L, T + config.window_size - 1) > M:
        raise SettingError(
            f"k must hold the {T} new tokens, and sliding_k those and the {config.window_size - 1} before them, "
            f"got {L} and {M}"
        )
    needed = max(0, (L - config.compress_block_size) // config.compress_stride + 1)
    if len(summary_k) < needed:
        raise SettingError(f"summary_k must hold the {needed} complete blocks of {L} tokens, got {len(summary_k)}")
    M = min(M, T + config.window_size - 1)
    seen = k, v, sliding_k[-M:], sliding_v[-M:], summary_k[:needed], summary_v[:needed]  # the rest costs time alone
    chosen = plan(q, v, config, backend)
    if chosen.backend == "triton":
        from nsa_kernels.decode.prefill import attend_chunk

        k, v, sliding_k, sliding_v, summary_k, summary_v = (x.contiguous() for x in seen)
        pairs = (k, v), (sliding_k, sliding_v), (summary_k, summary_v)
        return attend_chunk(q.contiguous(), gates.contiguous(), *pairs, config, scale, chosen.stages)
    cache = LayerCache(*(x.unsqueeze(0) for x in seen))
    tokens = torch.arange(L, device=q.device).unsqueeze(0)  # [1, L]
    sliding = Keys(cache.sliding_k, cache.sliding_v, tokens[:, -M:])
    selected, summaries = (cache.k, cache.v), (cache.summary_k, cache.summary_v)
    out, blocks = attend_cache(
        q.unsqueeze(0), gates.unsqueeze(0), tokens[:, -T:], selected, sliding, summaries, config, scale
    )
    return NSAOutput(out.squeeze(0), blocks.squeeze(0))


def _used_slots(slots: int, positions: Tensor) -> int:
    """How many slots hold tokens of any sequence; all of them on a device that would be waited for."""
    return min(slots, int(positions.max()) + 1) if positions.device.type == "cpu" else slots


def _used(cache: LayerCache, positions: Tensor, config: NSAConfig) -> Iterator[Tensor]:
    """The part of a cache that holds tokens of any sequence, in whole selection blocks."""
    tokens = -(-_used_slots(cache.k.shape[1], positions) // config.select_block_size) * config.select_block_size
    rows = tokens // config.compress_stride
    for x, used in zip(cache, (tokens, tokens, tokens, tokens, rows, rows), strict=True):
        yield x[:, :used]


def _ring_tokens(position: Tensor, slots: int) -> Tensor:
    """The token in each slot of a ring that holds the last ones up to `position` [B, 1]; negative for none: [B, W]."""
    slot = torch.arange(slots, device=position.device)
    return position - (position - slot) % slots


def _check(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise SettingError(f"{name} must be {shape} here, got {tuple(x.shape)}")


def _check_new(pairs: Sequence[NewTokens], batch_size: int) -> None:
    for new in pairs:
        S = new.k_slots.shape[1]
        _check("k", new.k, (batch_size, *new.k.shape[1:]))
        _check("v", new.v, (batch_size, *new.v.shape[1:]))
        _check("k_slots", new.k_slots, (batch_size, S, *new.k.shape[1:]))
        _check("v_slots", new.v_slots, (batch_size, S, *new.v.shape[1:]))
        if not new.k.dtype == new.v.dtype == new.k_slots.dtype == new.v_slots.dtype:
            raise SettingError(
                f"slots must have the dtype of the keys and values, {new.k.dtype} and {new.v.dtype}, "
                f"got {new.k_slots.dtype} and {new.v_slots.dtype}"
            )


def _check_new_token(new: NewToken, cache: LayerCache, config: NSAConfig) -> None:
    (B, _, H_KV, D_QK), D_V, l = cache.k.shape, cache.v.shape[3], config.compress_block_size  # noqa: E741
    _check_new([*new.branches, new.compressed], B)
    for name, x, D in (("k_slots", new.compressed.k_slots, D_QK), ("v_slots", new.compressed.v_slots, D_V)):
        _check(f"{name} of the compressed branch", x, (B, l, H_KV, D))
    M = (0, 0) if new.weights is None else [side.in_weight.shape[2] for side in new.weights]
    for (name, x), size in zip(new.started._asdict().items(), (D_QK, D_V, *M), strict=True):
        _check(name, x, (B, l // config.compress_stride, H_KV, size))


def _check_pairs(cache: LayerCache, batch_size: int) -> None:
    H_KV, D_QK, D_V = *cache.k.shape[2:], cache.v.shape[3]
    for name, x in cache._asdict().items():
        pair = cache.k if name in ("k", "v") else cache.sliding_k if name.startswith("sliding") else cache.summary_k
        _check(name, x, (batch_size, pair.shape[1], H_KV, D_QK if name.endswith("k") else D_V))
