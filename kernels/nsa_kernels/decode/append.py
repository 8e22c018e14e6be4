"""Rotary embedding of one new token of each sequence and its way into the cache, in one launch for all branches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.arguments import heads_of
from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.elementwise import rotate_heads, whole_rows
from nsa_kernels.triton.primitives import wide
from nsa_kernels.triton.summarise import Angles

# B sequences, S slots, H query heads, H_kv KV heads, D head dim, R rotated dimensions of a head.


@triton.jit
def _copy_head(source_ptr, target_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy one head."""
    column = tl.arange(0, BLOCK_D)
    tl.store(target_ptr + column, tl.load(source_ptr + column, mask=column < D), mask=column < D)


class NewPair(NamedTuple):
    """A new key and value of one branch, and where they go."""

    k: Any  # [B, H_KV, D_QK]
    v: Any  # [B, H_KV, D_V]
    k_slots: Any  # [B, slots, H_KV, D_QK]
    v_slots: Any  # [B, slots, H_KV, D_V]
    slots: Any
    k_stride: Any  # from one sequence to the next
    v_stride: Any


@triton.jit
def append_head(
    pair, angles, position, sequence, kv_head, ROTATE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Write the key and value of one head of one branch to their slot; `angles` are the sequence's."""
    D_QK: tl.constexpr = HEADS.D_QK
    D_V: tl.constexpr = HEADS.D_V
    k, v = pair.k + sequence * pair.k_stride + kv_head * D_QK, pair.v + sequence * pair.v_stride + kv_head * D_V
    target = (sequence * pair.slots + position % pair.slots) * HEADS.H_KV + kv_head
    column = tl.arange(0, HEADS.BLOCK_QK)
    if ROTATE:
        rotate_heads(k, pair.k_slots + target * D_QK, angles.cos, angles.sin, column, column < D_QK, HALF)
    else:
        _copy_head(k, pair.k_slots + target * D_QK, D_QK, HEADS.BLOCK_QK)
    _copy_head(v, pair.v_slots + target * D_V, D_V, HEADS.BLOCK_V)


@triton.jit
def _append_kernel(
    q_ptr, out_ptr,  # [B, H, D_QK]
    cos_ptr, sin_ptr,  # [B, HALF]
    positions_ptr,  # [B]
    new,  # a NewPair of each branch
    q_stride, ROTATE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One program takes one head of one sequence: of the queries, or the key and value of one branch."""
    H: tl.constexpr = HEADS.H
    D_QK: tl.constexpr = HEADS.D_QK
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    head, sequence = tl.program_id(0), wide(tl.program_id(1))
    angles = Angles(cos_ptr + sequence * HALF, sin_ptr + sequence * HALF)
    column = tl.arange(0, HEADS.BLOCK_QK)
    if head < H:
        rotate_heads(q_ptr + sequence * q_stride + head * D_QK, out_ptr + (sequence * H + head) * D_QK,
                     angles.cos, angles.sin, column, column < D_QK, HALF)  # fmt: skip
    for i in tl.static_range(len(ROTATE)):
        kv_head = head - H - i * HEADS.H_KV
        if (kv_head >= 0) & (kv_head < HEADS.H_KV):
            position = tl.load(positions_ptr + sequence)
            append_head(new[i], angles, position, sequence, kv_head, ROTATE[i], HEADS, HALF)


def new_pairs(pairs: Sequence[Any]) -> tuple[tuple[NewPair, ...], tuple[bool, ...]]:
    """What a kernel takes of NewTokens, and which keys it rotates."""
    rows = [(whole_rows(new.k), whole_rows(new.v), new) for new in pairs]
    taken = (
        NewPair(k, v, new.k_slots, new.v_slots, new.k_slots.shape[1], k.stride(0), v.stride(0)) for k, v, new in rows
    )
    return tuple(taken), tuple(new.rotate for new in pairs)


def launch_append(q: Tensor, pairs: Sequence[Any], positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`decode.append_tokens`; slots are contiguous."""
    q, heads, (new, rotates) = whole_rows(q), heads_of(q, pairs[0].v), new_pairs(pairs)
    out, (early, overlap) = q.new_empty(q.shape), early_start(q.device)
    _append_kernel[(heads.H + len(pairs) * heads.H_KV, len(q))](
        q, out, cos.contiguous(), sin.contiguous(), positions, new, q.stride(0), rotates, heads, cos.shape[1], early,
        num_warps=1, **overlap,
    )  # fmt: skip
    return out
