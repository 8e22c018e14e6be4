"""The attention kinds by the names that `model.transformer.attention` gives them: a line each."""

from nsa_lightning.model.attention.dense import FullKind, SlidingKind
from nsa_lightning.model.attention.nsa import NSAKind
from nsa_lightning.model.config import ATTENTION_KINDS

ATTENTION_KINDS |= {
    "nsa": NSAKind(),
    "full": FullKind(),
    "sliding": SlidingKind(),
}


def is_new_part(name: str) -> bool:
    """Whether the parameter of that name belongs to what a dense model has no counterpart of: gates and summaries."""
    return not {part for kind in ATTENTION_KINDS.values() for part in kind.new_parts}.isdisjoint(name.split("."))


def name_in_dense_model(name: str) -> str:
    """The parameter of a dense model that one of this name starts as in a conversion; a new part has none."""
    layer, separator, part = name.partition(".self_attn.")
    module, _, rest = part.partition(".")
    copied = any(module in kind.copies for kind in ATTENTION_KINDS.values())
    return f"{layer}{separator}{rest}" if copied else name


def kept_operators() -> tuple[str, ...]:
    """Beginnings of the names of all operators that compute attention, for selective recomputation."""
    return tuple({name for kind in ATTENTION_KINDS.values() for name in kind.operators})
