"""Settings of the sparse methods, one class for all: each row of a table says every value that changes its result."""

from dataclasses import dataclass
from typing import Literal

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

Phases = Literal["prefill", "decode", "both"]


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """What a query reads, and how that is chosen. The defaults are those of arXiv:2502.11089, section 4.

    Raises:
        ValueError: a value is out of range or of another type, or the budget is smaller than the forced tokens.
    """

    budget: int = 2560
    """Tokens that each query reads, the leading and local ones included."""

    leading: int = 128
    """The first tokens of the text, which every query reads."""

    local: int = 512
    """The last tokens up to the query, itself included, which it always reads."""

    dense_layers: int | list[int] | None = None
    """Layers that stay dense: a number of first layers, or their indices. Left out: 2 for quest, none for the rest."""

    phases: Phases | None = None
    """Where the method is sparse: in the prompt, behind it, or both. Left out: decode for quest and h2o, which were
    published so, and both for the rest."""

    per_group: bool = False
    """exact_top, quest, h2o: choose once for all query heads of a KV head, by the sum of their scores, instead of for
    each head. exact_top_blocks always chooses for a KV head, infllm for a layer."""

    block_size: int = 64
    """exact_top_blocks: tokens of a block; also of the blocks that recall is counted by."""

    page_size: int = 16
    """quest: tokens of a page."""

    memory_block_size: int = 128
    """infllm: tokens of a block."""

    representatives: int = 4
    """infllm: tokens that stand for a block."""

    query_block: int = 128
    """infllm: queries of a prompt that choose together."""

    far_positions: Literal["own", "window"] = "own"
    """infllm: distance at which tokens beyond the local ones are seen: their own, or that of the end of the window for
    all (as published)."""

    evict_every: int = 64
    """h2o: tokens of a prompt between two evictions, where the prompt is sparse; behind it, 1."""

    def __post_init__(self) -> None:
        check_types(self)
        positive = ("budget", "block_size", "page_size", "memory_block_size", "representatives", "query_block")
        least = dict.fromkeys((*positive, "evict_every"), 1) | {"leading": 0, "local": 0}
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise SettingError(f"{name} must be at least {smallest}, got {getattr(self, name)}")
        if self.budget < self.leading + self.local:
            raise SettingError(
                f"budget must hold the leading and local tokens, got {self.budget} for {self.leading} + {self.local}"
            )
        if self.representatives > self.memory_block_size:
            raise SettingError(
                "representatives must be at most memory_block_size, "
                f"got {self.representatives} and {self.memory_block_size}"
            )
        if min([0, *self.dense_list]) < 0:
            raise SettingError(f"dense_layers must not be negative, got {self.dense_layers}")

    @property
    def free(self) -> int:
        """Tokens of the budget that a method may choose."""
        return self.budget - self.leading - self.local

    @property
    def dense_list(self) -> list[int]:
        """The values of `dense_layers`."""
        if self.dense_layers is None:
            return []
        return [self.dense_layers] if isinstance(self.dense_layers, int) else list(self.dense_layers)

    def check_blocks(self, name: str) -> None:
        """Raise ValueError where the budget is not of whole blocks, or too small for the forced ones.

        Args:
            name: the setting that holds the tokens of a block.
        """
        size = getattr(self, name)
        if self.budget % size:
            raise SettingError(f"budget must be a multiple of {name}, got {self.budget} and {size}")
        first, last = blocks_of(self.leading, size), blocks_of(self.local, size)
        if self.budget < (first + last) * size:
            raise SettingError(
                f"budget must hold {first} leading and {last} local blocks of {size} tokens ({name}), "
                f"{(first + last) * size} tokens in all, got {self.budget}"
            )


def blocks_of(tokens: int, size: int) -> int:
    """Blocks that hold so many tokens."""
    return -(-tokens // size)
