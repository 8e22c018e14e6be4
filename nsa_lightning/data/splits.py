"""Which split a document falls to: its text alone decides."""

import hashlib

SPLITS = ("train", "val", "test")


def text_fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: equal texts meet in one split, whatever their names."""
    return (int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 11) / 2**53


def split_of(text: str, val_fraction: float, test_fraction: float) -> str:
    """The split of a document: the same in any run and any worker."""
    fraction = text_fraction(text)
    if fraction < test_fraction:
        return "test"
    return "val" if fraction < test_fraction + val_fraction else "train"
