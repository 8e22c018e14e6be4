"""What tests on a GPU share; the mark `gpu` leaves them out where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def epsilon(dtype: torch.dtype) -> float:
    """Rounding of the dtype; float32 sums in another order stray by a few of its own."""
    return 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps


@contextmanager
def refusing_to_wait() -> Iterator[None]:
    """Within, an operation that makes the host wait for the device raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
