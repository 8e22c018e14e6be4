"""What `nsa bench training` measures: its settings, and the cases that they make."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple, get_args

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.benchmark.cases import RESULTS_NAME, DocumentMix, check_choices, check_filled, check_output

PLOT_NAME = "training.png"


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of `nsa bench training`.

    Raises:
        ValueError: a setting that cannot be measured, by its name, the rule and the value.
    """

    lengths: list[int] = field(default_factory=lambda: [8192, 32768, 65536, 131072])
    """Tokens in a sequence (data.seq_len); data.batch_size sequences a step on each GPU, as in the config."""

    attention: list[str] = field(default_factory=lambda: ["nsa", "full"])
    """Of the layers: nsa, full or sliding, or a pattern such as nsa,nsa,full."""

    devices: list[int] = field(default_factory=list)
    """GPUs; if none are given, trainer.devices. Several numbers measure weak scaling."""

    compile: list[bool] = field(default_factory=list)
    """true, false or both; if not given, model.compile."""

    documents: str = "one"
    """What a sequence is: one document, mixed ones from 128 to 16384 tokens, or equal_1k."""

    steps: int = 10
    """Measured steps of the optimizer; their median counts."""

    warmup_steps: int = 3
    """Steps before them, which compile and tune."""

    profile: bool = False
    """Also profile two steps more, for the share of time in which a GPU runs NCCL's kernels alone."""

    time_limit: float = 600.0
    """Seconds after which a case is given up."""

    output_dir: Path = Path("runs/bench_training")
    """Where results.json and training.png are written, and the output of cases that failed."""

    overwrite: bool = False
    """Replace results that are there."""

    fit: list[str] = field(default_factory=list)
    """Settings of nsa fit; --config, and those with a dot in their name, need no --fit before them."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices("documents", [self.documents], get_args(DocumentMix))
        for name in ("lengths", "attention"):
            check_filled(name, getattr(self, name))
        for name in ("devices", "compile"):
            if getattr(self, name):
                check_filled(name, getattr(self, name))
        for name, values in (
            ("lengths", self.lengths), ("devices", self.devices), ("steps", [self.steps]),
            ("warmup_steps", [self.warmup_steps]),
        ):  # fmt: skip
            if values and min(values) < 1:
                raise SettingError(f"{name} must be at least 1, got {min(values)}")
        if not self.time_limit > 0:
            raise SettingError(f"time_limit must be seconds above 0, got {self.time_limit}")
        if not any(word.split("=")[0] == "--config" for word in self.fit):
            raise SettingError("config must name a config of nsa fit, got none. Set --config")
        check_output(self.output_dir, (RESULTS_NAME, PLOT_NAME), self.overwrite)

    def cases(self) -> "Iterator[TrainingCase]":
        """The runs to measure, in their order."""
        worlds: list[int | None] = [*self.devices] or [None]
        compile: list[bool | None] = [*self.compile] or [None]
        for devices, compiled, attention, tokens in product(worlds, compile, self.attention, self.lengths):
            yield TrainingCase(tokens, attention, devices, compiled)


class TrainingCase(NamedTuple):
    """One run; None leaves a setting as the config has it."""

    tokens: int
    attention: str
    devices: int | None
    compile: bool | None

    @property
    def fit_words(self) -> list[str]:
        """The case as settings of `nsa fit`."""
        words = ["--data.seq_len", str(self.tokens)]
        words += ["--model.transformer.attention", json.dumps(self.attention.split(","))]
        words += ["--trainer.devices", str(self.devices), "--trainer.num_nodes", "1"] if self.devices else []
        return words + (["--model.compile", json.dumps(self.compile)] if self.compile is not None else [])

    @property
    def description(self) -> str:
        """The case in words."""
        words = [self.attention, f"{self.tokens} tokens"]
        words += [f"{self.devices} device{'' if self.devices == 1 else 's'}"] if self.devices else []
        return ", ".join(words + ([] if self.compile is None else ["compiled" if self.compile else "not compiled"]))
