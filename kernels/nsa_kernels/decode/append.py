"""Rotary embedding of one new token of each sequence and its way into the cache, in one launch for all branches."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.triton.early_start import await_launch_before, early_start, let_next_begin
from nsa_kernels.triton.elementwise import rotate_heads, whole_rows
from nsa_kernels.triton.primitives import padded, wide

# B sequences, S slots, H query heads, H_kv KV heads, D head dim, R rotated dimensions of a head.


@triton.jit
def _copy_head(source_ptr, target_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy one head."""
    column = tl.arange(0, BLOCK_D)
    tl.store(target_ptr + column, tl.load(source_ptr + column, mask=column < D), mask=column < D)


@triton.jit
def append_head(
    k_ptr, v_ptr, k_slots_ptr, v_slots_ptr, slots, k_stride, v_stride, cos_ptr, sin_ptr, position, sequence, kv_head,
    ROTATE: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write the key and value of one head of one branch to their slot; `cos_ptr` and `sin_ptr` are the sequence's."""
    k, v = k_ptr + sequence * k_stride + kv_head * D_QK, v_ptr + sequence * v_stride + kv_head * D_V
    target, column = (sequence * slots + position % slots) * H_KV + kv_head, tl.arange(0, BLOCK_QK)
    if ROTATE:
        rotate_heads(k, k_slots_ptr + target * D_QK, cos_ptr, sin_ptr, column, column < D_QK, HALF)
    else:
        _copy_head(k, k_slots_ptr + target * D_QK, D_QK, BLOCK_QK)
    _copy_head(v, v_slots_ptr + target * D_V, D_V, BLOCK_V)


@triton.jit
def _append_kernel(
    q_ptr, out_ptr,  # [B, H, D_QK]
    cos_ptr, sin_ptr,  # [B, HALF]
    positions_ptr,  # [B]
    k_ptrs, v_ptrs,  # tuples of [B, H_KV, D]
    k_slots_ptrs, v_slots_ptrs,  # tuples of [B, S, H_KV, D]
    slots,  # tuple of S
    k_strides, v_strides,  # tuples: from one sequence to the next in k_ptrs and v_ptrs
    q_stride, ROTATE: tl.constexpr, H: tl.constexpr, H_KV: tl.constexpr, HALF: tl.constexpr,
    D_QK: tl.constexpr, D_V: tl.constexpr, BLOCK_QK: tl.constexpr, BLOCK_V: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One program takes one head of one sequence: of the queries, or the key and value of one branch."""
    await_launch_before(EARLY)
    let_next_begin(EARLY)
    head, sequence = tl.program_id(0), wide(tl.program_id(1))
    cos_ptr += sequence * HALF
    sin_ptr += sequence * HALF
    column = tl.arange(0, BLOCK_QK)
    if head < H:
        rotate_heads(q_ptr + sequence * q_stride + head * D_QK, out_ptr + (sequence * H + head) * D_QK,
                     cos_ptr, sin_ptr, column, column < D_QK, HALF)  # fmt: skip
    for i in tl.static_range(len(ROTATE)):
        kv_head = head - H - i * H_KV
        if (kv_head >= 0) & (kv_head < H_KV):
            append_head(k_ptrs[i], v_ptrs[i], k_slots_ptrs[i], v_slots_ptrs[i], slots[i], k_strides[i], v_strides[i],
                        cos_ptr, sin_ptr, tl.load(positions_ptr + sequence), sequence, kv_head,
                        ROTATE[i], H_KV, HALF, D_QK, D_V, BLOCK_QK, BLOCK_V)  # fmt: skip


def pair_arguments(pairs: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """What a kernel takes of NewTokens: keys, values, their slots, how many these are, strides; `rotate` comes last."""
    k, v = [whole_rows(new.k) for new in pairs], [whole_rows(new.v) for new in pairs]
    return (
        tuple(k),
        tuple(v),
        tuple(new.k_slots for new in pairs),
        tuple(new.v_slots for new in pairs),
        tuple(new.k_slots.shape[1] for new in pairs),
        tuple(x.stride(0) for x in k),
        tuple(x.stride(0) for x in v),
        tuple(new.rotate for new in pairs),
    )


def launch_append(q: Tensor, pairs: Sequence[Any], positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`decode.append_tokens`; slots are contiguous."""
    (B, H, D_QK), (_, H_KV, D_V) = q.shape, pairs[0].v.shape
    q, (*arguments, rotates) = whole_rows(q), pair_arguments(pairs)
    out, (early, overlap) = q.new_empty(B, H, D_QK), early_start(q.device)
    _append_kernel[(H + len(pairs) * H_KV, B)](
        q, out, cos.contiguous(), sin.contiguous(), positions, *arguments, q.stride(0), rotates,
        H, H_KV, cos.shape[1], D_QK, D_V, padded(D_QK), padded(D_V), early, num_warps=1, **overlap,
    )  # fmt: skip
    return out
