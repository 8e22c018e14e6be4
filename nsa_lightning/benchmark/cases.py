"""What is measured: shapes, document mixes and settings, checked before anything runs."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

InputKind = Literal["random", "overlap"]
DocumentMix = Literal["one", "mixed", "equal_1k"]

DTYPES = ("bfloat16", "float16", "float32")
RESULTS_NAME, PLOT_NAME = "results.json", "kernels.png"


class Shape(NamedTuple):
    """Heads and head dimensions of one attention layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    qk_dim: int
    v_dim: int

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def description(self) -> str:
        """The shape in words."""
        dims = f"{self.qk_dim}" if self.qk_dim == self.v_dim else f"{self.qk_dim}/{self.v_dim}"
        return f"{self.name}: {self.num_heads} query heads on {self.num_kv_heads} KV heads, D {dims}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("A", 64, 4, 128, 128),
        Shape("B", 32, 8, 128, 128),
        Shape("paper", 64, 4, 192, 128),
        Shape("smollm", 9, 3, 64, 64),
    )
}
"""A and B: large and small groups at the usual head dimension; the paper's own; SmolLM2-135M."""

_CUSTOM_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")

_SHORTEST, _LONGEST, _EQUAL = 128, 16384, 1024


def parse_shape(text: str) -> Shape:
    """A named shape, or HEADSxKV_HEADSxQK_DIMxV_DIM.

    Raises:
        ValueError: neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    match = _CUSTOM_SHAPE.fullmatch(text)
    if not match:
        raise SettingError(
            f"shapes must be of {', '.join(SHAPES)} or like 64x4x192x128 "
            f"(query heads, KV heads, query and value head dim), got {text!r}"
        )
    num_heads, num_kv_heads, qk_dim, v_dim = map(int, match.groups())
    if min(num_heads, num_kv_heads, qk_dim, v_dim) < 1:
        raise SettingError(f"shapes must have heads and dimensions of at least 1, got {text!r}")
    if num_heads % num_kv_heads:
        raise SettingError(f"shapes must have a multiple of the KV heads as query heads, got {text!r}")
    return Shape(text, num_heads, num_kv_heads, qk_dim, v_dim)


def document_lengths(mix: DocumentMix, num_tokens: int) -> list[int]:
    """Tokens of each document of a packing of `num_tokens`; the last document takes what is left.

    `one` document; `mixed`, log-uniform from 128 to 16384 tokens, the same for every run; `equal_1k`, 1024 tokens each.
    """
    if mix == "one":
        return [num_tokens]
    draw = random.Random(num_tokens)
    lengths: list[int] = []
    left = num_tokens
    while left:
        length = _EQUAL
        if mix == "mixed":
            length = round(math.exp(draw.uniform(math.log(_SHORTEST), math.log(_LONGEST))))
            length = left if left - length < _SHORTEST else length
        lengths.append(min(length, left))
        left -= lengths[-1]
    return lengths


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """The settings of `nsa bench kernels`.

    Raises:
        ValueError: a setting that cannot be measured, by its name, the rule and the value.
    """

    shapes: list[str] = field(default_factory=lambda: ["A", "B"])
    """A (64 query heads on 4 KV heads, D 128), B (32 on 8, D 128), paper (64 on 4, D 192 and 128 for values), smollm
    (9 on 3, D 64), or your own as HEADSxKV_HEADSxQK_DIMxV_DIM, such as 64x4x192x128."""

    lengths: list[int] = field(default_factory=lambda: [8192, 16384, 32768, 65536])
    """Tokens of a packing."""

    documents: list[str] = field(default_factory=lambda: ["one", "mixed"])
    """How the tokens are split: one document; mixed, from 128 to 16384 tokens, log-uniform; equal_1k, 1024 tokens
    each."""

    inputs: list[str] = field(default_factory=lambda: ["random", "overlap"])
    """random, where every query chooses its own blocks, or overlap, where neighbouring queries agree as those of a real
    model do."""

    dtype: str = "bfloat16"
    """bfloat16, float16 or float32."""

    backend: str = "auto"
    """Of native_sparse_attention: auto picks the fastest for the device."""

    device: str = "cuda"
    """cuda, cuda:N, or cpu for a smoke test with tiny lengths."""

    check: bool = True
    """Check every stage first; if one fails, end with status 1 and time nothing."""

    check_documents: list[int] = field(default_factory=lambda: [1, 31, 700, 1, 2100, 64, 1300])
    """Tokens of each document of the packing that is checked."""

    stages: bool = True
    """Time each stage, and say how far it is from its floor."""

    rivals: bool = True
    """Time full attention."""

    time_budget: float = 0.5
    """Seconds for the repetitions of one measurement."""

    repetitions: int = 3
    """The fewest repetitions of one measurement."""

    output_dir: Path = Path("runs/bench")
    """Where results.json and kernels.png are written."""

    overwrite: bool = False
    """Replace results that are there."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices("documents", self.documents, get_args(DocumentMix))
        check_choices("inputs", self.inputs, get_args(InputKind))
        check_choices("dtype", [self.dtype], DTYPES)
        check_filled("shapes", self.shapes)
        for shape in self.shapes:
            parse_shape(shape)
        for name in ("lengths", "check_documents"):
            values = getattr(self, name)
            check_filled(name, values)
            if min(values) < 1:
                raise SettingError(f"{name} must be at least 1 token each, got {min(values)}")
        check_timing(self.time_budget, self.repetitions)
        check_output(self.output_dir, (RESULTS_NAME, PLOT_NAME), self.overwrite)


def check_timing(time_budget: float, repetitions: int) -> None:
    """Refuse what no measurement can keep to: seconds for the repetitions of one, and the fewest of them."""
    if not 0 < time_budget < math.inf:
        raise SettingError(f"time_budget must be seconds above 0, got {time_budget}")
    if repetitions < 1:
        raise SettingError(f"repetitions must be at least 1, got {repetitions}")


def check_output(output_dir: Path, names: Sequence[str], overwrite: bool) -> None:
    """Refuse a directory whose results would be replaced without a word.

    Raises:
        ValueError: it is a file, or holds one of the names and `overwrite` is not set.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise SettingError(f"output_dir must be a directory, got the file {output_dir}")
    for name in names:
        if (output_dir / name).exists() and not overwrite:
            raise SettingError(
                f"output_dir must not hold {name} yet, got {output_dir}: "
                "set --output_dir to another directory, or --overwrite true"
            )


def check_filled(name: str, values: list[str] | list[int]) -> None:
    """Refuse a list that is empty or, but for documents to check, names a value twice."""
    if not values:
        raise SettingError(f"{name} must name at least one, got none")
    if len(set(values)) < len(values):
        repeated = next(value for value in values if values.count(value) > 1)  # type: ignore[arg-type]
        if name != "check_documents":
            raise SettingError(f"{name} must name each value once, got {repeated} again")


def check_choices(name: str, values: list[str], choices: tuple[str, ...]) -> None:
    """Refuse a list with a value that is no choice."""
    check_filled(name, values)
    for value in values:
        if value not in choices:
            raise SettingError(f"{name} must be of {', '.join(choices)}, got {value!r}")
