"""The one type that travels from the data to the model."""

from typing import NamedTuple

from torch import Tensor

IGNORE_INDEX = -100
"""Target of a token whose prediction is not scored."""


class PackedBatch(NamedTuple):
    """Documents laid end to end; attention never crosses a boundary of `cu_seqlens`."""

    tokens: Tensor  # int64 [T]
    targets: Tensor  # int64 [T], the next token; IGNORE_INDEX at each document's last token
    positions: Tensor  # int64 [T], restarts at 0 with each document
    cu_seqlens: Tensor  # int32 [N + 1]
    max_seqlen: int  # an upper bound on the longest document's length
    target_bytes: Tensor  # int64 [], UTF-8 bytes that the scored targets stand for
