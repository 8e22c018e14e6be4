"""`nsa bench decode`: check the kernels of a step, then time NSA beside full attention, a layer and a whole model."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types

from nsa_lightning.benchmark.cases import (
    DTYPES,
    RESULTS_NAME,
    check_choices,
    check_filled,
    check_output,
    check_timing,
    parse_shape,
)
from nsa_lightning.benchmark.hardware import check_hardware
from nsa_lightning.benchmark.results import Outcome, Report, environment, measure_and_write

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_lightning.benchmark.checks import Check
    from nsa_lightning.benchmark.decode_layer import DecodeBench
    from nsa_lightning.benchmark.decode_records import DecodeRecord
    from nsa_lightning.benchmark.rivals import Rival
    from nsa_lightning.model.config import TransformerConfig

PLOT_NAME = "decode.png"


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """The settings of `nsa bench decode`.

    Raises:
        ValueError: a setting that cannot be measured, by its name, the rule and the value.
    """

    shapes: list[str] = field(default_factory=lambda: ["A", "B"])
    """A (64 query heads on 4 KV heads, D 128), B (32 on 8, D 128), paper (64 on 4, D 192 and 128 for values), smollm
    (9 on 3, D 64), or your own as HEADSxKV_HEADSxQK_DIMxV_DIM, such as 64x4x192x128; [] for none."""

    lengths: list[int] = field(default_factory=lambda: [4096, 16384, 65536, 262144])
    """Tokens of every sequence, the new one included."""

    batch_sizes: list[int] = field(default_factory=lambda: [1, 8, 64])
    """Sequences."""

    config: Path | None = None
    """Config of nsa fit, whose model is measured too: random weights, a cache of random numbers."""

    prefill_lengths: list[int] = field(default_factory=lambda: [131072])
    """Tokens of the prompts that this model takes in."""

    dtype: str = "bfloat16"
    """bfloat16, float16 or float32."""

    backend: str = "auto"
    """Of the attention layers: auto picks the fastest for the device. The model has that of its config."""

    device: str = "cuda"
    """cuda, cuda:N, or cpu for a smoke test with tiny lengths."""

    check: bool = True
    """Check the kernels first; if one fails, end with status 1 and time nothing."""

    check_lengths: list[int] = field(default_factory=lambda: [1, 31, 32, 1024, 1025, 2000, 5000])
    """Tokens of each sequence of the batch that is checked."""

    rivals: bool = True
    """Time full attention."""

    time_budget: float = 0.15
    """Seconds for the repetitions of one measurement."""

    repetitions: int = 3
    """The fewest repetitions of one measurement."""

    output_dir: Path = Path("runs/bench_decode")
    """Where results.json and decode.png are written."""

    overwrite: bool = False
    """Replace results that are there."""

    def __post_init__(self) -> None:
        check_types(self)
        check_choices("dtype", [self.dtype], DTYPES)
        if not self.shapes and self.config is None:
            raise SettingError("shapes must name at least one where config names no model, got none")
        for shape in self.shapes:
            parse_shape(shape)
        for name in ("shapes", "prefill_lengths"):
            if getattr(self, name):
                check_filled(name, getattr(self, name))
        for name in ("lengths", "batch_sizes"):
            check_filled(name, getattr(self, name))
        if self.check and not self.check_lengths:
            raise SettingError("check_lengths must name at least one where check is set, got none")
        for name in ("lengths", "batch_sizes", "prefill_lengths", "check_lengths"):
            least = min(getattr(self, name), default=1)
            if least < 1:
                raise SettingError(f"{name} must be at least 1 each, got {least}")
        check_timing(self.time_budget, self.repetitions)
        check_output(self.output_dir, (RESULTS_NAME, PLOT_NAME), self.overwrite)


def bench_decode(settings: DecodeSettings, report: Report, progress: Report) -> Outcome:
    """Check the kernels of a step, then time a new token, NSA beside full attention, and write what was found.

    Args:
        settings: what is measured.
        report: is told the device and the verdicts of the checks, before anything is timed.
        progress: is told what is done next.

    Raises:
        ValueError: the device or the backend is not there, or the config cannot be read.
    """
    from nsa_lightning.benchmark.decode_model import read_transformer_config
    from nsa_lightning.benchmark.decode_report import decode_tables, draw_decode, legend
    from nsa_lightning.benchmark.report import check_table, failed_checks

    check_hardware(settings.device, settings.backend)
    model = read_transformer_config(settings.config) if settings.config is not None else None
    where = environment(settings.device)
    report("  ".join(f"{name} {value}" for name, value in where.items() if value))
    checks, unusable = _check(settings, progress) if settings.check else ([], {})
    if checks:
        report(f"\n{check_table(checks)}")
    if failed := failed_checks(checks):
        return Outcome("", failed=failed)
    bench = _prepare(settings)
    run = {"environment": where, "ceilings": bench.ceilings._asdict()}
    measured = _measure(settings, bench, unusable, model, progress)
    return measure_and_write(
        asdict(settings), PLOT_NAME, run, checks, measured, draw_decode,
        lambda records: f"\n{legend(bench.ceilings)}\n\n{decode_tables(records)}",
    )  # fmt: skip


def _check(settings: DecodeSettings, progress: Report) -> "tuple[list[Check], dict[str, dict[Rival, str]]]":
    """The verdict on the kernels for every shape; and by shape the rivals that cannot be used."""
    import torch
    from nsa_kernels import NSAConfig

    from nsa_lightning.benchmark.checks import Task
    from nsa_lightning.benchmark.decode_checks import check_decode, unusable_rivals

    device, dtype, config = torch.device(settings.device), getattr(torch, settings.dtype), NSAConfig()
    backend: Any = settings.backend
    checks: list[Check] = []
    unusable: dict[str, dict[Rival, str]] = {}
    for name in settings.shapes:
        shape = parse_shape(name)
        progress(f"checking shape {name}")
        checks += check_decode(Task(shape, settings.check_lengths, config, dtype, device, backend))
        if settings.rivals:
            unusable[name] = unusable_rivals(shape, config, dtype, device)
    return checks, unusable


def _prepare(settings: DecodeSettings) -> "DecodeBench":
    """Measure the device's rates."""
    import torch
    from nsa_kernels import NSAConfig

    from nsa_lightning.benchmark.decode_layer import DecodeBench
    from nsa_lightning.benchmark.timing import Clock, cache_flush, measure_ceilings, release_memory

    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    clock = Clock(device, settings.time_budget, settings.repetitions)
    ceilings = measure_ceilings(dtype, clock)
    release_memory()
    backend: Any = settings.backend
    return DecodeBench(backend, NSAConfig(), dtype, clock, ceilings, cache_flush(device))


def _measure(
    settings: DecodeSettings,
    bench: "DecodeBench",
    unusable: "dict[str, dict[Rival, str]]",
    model: "TransformerConfig | None",
    progress: Report,
) -> "Iterator[list[DecodeRecord]]":
    """The records of one case after another."""
    from nsa_lightning.benchmark.decode_layer import measure_layer
    from nsa_lightning.benchmark.decode_model import measure_model
    from nsa_lightning.benchmark.decode_records import DecodeCase

    sizes = [(batch_size, length) for batch_size in settings.batch_sizes for length in settings.lengths]
    for shape in map(parse_shape, settings.shapes):
        for batch_size, length in sizes:
            case = DecodeCase("layer", shape.name, shape.description, batch_size, length)
            progress(case.words)
            yield list(measure_layer(bench, case, shape, unusable.get(shape.name, {}) if settings.rivals else None))
    if settings.config is not None and model is not None:
        name = settings.config.stem
        cases = [DecodeCase("model", name, f"{name}: a step of the whole model", *size) for size in sizes]
        prefills = (DecodeCase("prefill", name, f"{name}: prefill", 1, length) for length in settings.prefill_lengths)
        for record in measure_model(bench, model, [*cases, *prefills], settings.rivals, progress):
            yield [record]
