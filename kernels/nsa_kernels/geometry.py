"""The sizes that define Native Sparse Attention, checked once (arXiv:2502.11089, sec. 3.3)."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types


@dataclass(frozen=True, kw_only=True)
class NSAConfig:
    """Block sizes, counts and window of one NSA layer.

    Raises:
        ValueError: a size is not a positive integer, the stride does not divide a block size, or the forced blocks
            outnumber the selected ones.
    """

    compress_block_size: int = 32
    """Tokens that one compressed key/value summarises (l in the paper)."""

    compress_stride: int = 16
    """Tokens between the starts of neighbouring compression blocks (d); divides both block sizes."""

    select_block_size: int = 64
    """Tokens in one selectable block (l')."""

    num_selected_blocks: int = 16
    """Blocks that a query attends to in the selection branch (n), forced blocks included."""

    num_init_blocks: int = 1
    """Blocks at the start of the document that every query selects."""

    num_local_blocks: int = 2
    """Blocks that end with the query's own block and that every query selects; at least 1."""

    window_size: int = 512
    """Tokens in the sliding window, the query's own included (w)."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "compress_block_size",
            "compress_stride",
            "select_block_size",
            "num_selected_blocks",
            "num_local_blocks",
            "window_size",
        ):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_init_blocks < 0:
            raise SettingError(f"num_init_blocks must be at least 0, got {self.num_init_blocks}")
        for name in ("compress_block_size", "select_block_size"):
            if getattr(self, name) % self.compress_stride:
                raise SettingError(
                    f"compress_stride must divide {name}, got {self.compress_stride} and {getattr(self, name)}"
                )
        forced = self.num_init_blocks + self.num_local_blocks
        if self.num_selected_blocks < forced:
            raise SettingError(
                "num_selected_blocks must be at least num_init_blocks + num_local_blocks, "
                f"got {self.num_selected_blocks} and {self.num_init_blocks} + {self.num_local_blocks}"
            )

    @property
    def selected_tokens(self) -> int:
        """Tokens that the selection branch can reach at once (n · l'): up to there it equals full attention."""
        return self.num_selected_blocks * self.select_block_size

    def within(self, num_tokens: int) -> "NSAConfig":
        """A config that means the same in documents of up to so many tokens, its block sizes fit for kernels.

        Of sizes that no document reaches one is like another. Only unusual ones are compared with `num_tokens`: under
        torch.compile its value would hold for the graph.
        """
        l, d, size = self.compress_block_size, self.compress_stride, self.select_block_size  # noqa: E741
        if max(l, size) <= _USUAL_SIZE:
            return self
        most = max(num_tokens, _LEAST_SIZE)
        if d > most:
            l = d = size = 1 << most.bit_length()  # noqa: E741
        else:
            l = min(l, (most // d + 1) * d)  # noqa: E741
            size = min(size, -(-most // d) * d if size & (size - 1) else 1 << (most - 1).bit_length())
        return replace(self, compress_block_size=l, compress_stride=d, select_block_size=size)


def filled_slots(num_slots: int, block_size: int, num_tokens: int) -> int:
    """How many slots of a query can hold a block in documents of up to so many tokens, or a few more.

    They come before the others, which hold -1. Powers of two, so that kernels are compiled for few of them.
    """
    blocks = -(-num_tokens // block_size)
    return min(num_slots, max(_USUAL_SLOTS, 1 << (blocks - 1).bit_length()))


_USUAL_SIZE, _LEAST_SIZE, _USUAL_SLOTS = 4096, 64, 32
"""Block sizes in tokens up to which nothing is looked at, what they are not reduced below; and slots of a query."""


class CompressionWeights(NamedTuple):
    """The learned part of a block summary, φ(x) = mean(x) + f(x + e); the mean kind has none."""

    position_embedding: Tensor  # e, [H_kv, l, D]
    in_weight: Tensor  # [H_kv, l * D, M]; M = D for the linear kind
    in_bias: Tensor  # [H_kv, M]
    out_weight: Tensor | None = None  # [H_kv, M, D]; None for the linear kind
    out_bias: Tensor | None = None  # [H_kv, D]


class Branches(NamedTuple):
    """Keys and values of the three branches, and how those of the compressed one are summarised."""

    k: Tensor  # [T, H_kv, D_qk], selected branch
    v: Tensor  # [T, H_kv, D_v]
    sliding_k: Tensor  # [T, H_kv, D_qk]
    sliding_v: Tensor  # [T, H_kv, D_v]
    compress_k: Tensor  # [T, H_kv, D_qk]
    compress_v: Tensor  # [T, H_kv, D_v]
    k_weights: CompressionWeights | None = None
    v_weights: CompressionWeights | None = None
    compressed_rotary: tuple[Tensor, Tensor] | None = None  # cosines and sines of the key summaries, [C, R/2] each


class NSAOutput(NamedTuple):
    """What Native Sparse Attention returns."""

    out: Tensor  # [T, H, D_v], the gated sum of the branches
    block_indices: Tensor  # int32 [T, H_kv, n], ascending, then -1 in empty slots; relative to the document
