"""`nsa bench kernels`: check every stage, then time NSA beside PyTorch's full attention."""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_lightning.benchmark.cases import (
    PLOT_NAME,
    KernelSettings,
    Shape,
    document_lengths,
    parse_shape,
)
from nsa_lightning.benchmark.hardware import check_hardware

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_kernels import Plan

    from nsa_lightning.benchmark.checks import Check
    from nsa_lightning.benchmark.measure import Bench
    from nsa_lightning.benchmark.results import Case, Record


def bench_kernels(
    *,
    shapes: list[str] = ["A", "B"],  # noqa: B006 - read only; jsonargparse shows it
    lengths: list[int] = [8192, 16384, 32768, 65536],  # noqa: B006
    documents: list[str] = ["one", "mixed"],  # noqa: B006
    inputs: list[str] = ["random", "overlap"],  # noqa: B006
    dtype: str = "bfloat16",
    backend: str = "auto",
    device: str = "cuda",
    check: bool = True,
    check_documents: list[int] = [1, 31, 700, 1, 2100, 64, 1300],  # noqa: B006
    stages: bool = True,
    rivals: bool = True,
    time_budget: float = 0.5,
    repetitions: int = 3,
    output_dir: Path = Path("runs/bench"),
    overwrite: bool = False,
) -> int:
    """Check each stage against the eager backend in float32, then time NSA beside PyTorch's full attention.

    Everything is timed in one run: the operator (q, k, v, gates to output, compression and the choice of blocks
    included), its stages, and full causal attention through PyTorch's flash and cuDNN kernels; forward and backward.
    Prints which kernel runs each stage of a shape, then tables, and writes results.json (after every case) and
    kernels.png to output_dir. Block sizes are the defaults of NSAConfig.

    Args:
        shapes: A (64 query heads on 4 KV heads, D 128), B (32 on 8, D 128), paper (64 on 4, D 192 and 128 for values),
            smollm (9 on 3, D 64), or your own as HEADSxKV_HEADSxQK_DIMxV_DIM, such as 64x4x192x128.
        lengths: tokens of a packing.
        documents: how the tokens are split: one document; mixed, from 128 to 16384 tokens, log-uniform; equal_1k,
            1024 tokens each.
        inputs: random, where every query chooses its own blocks, or overlap, where neighbouring queries agree as
            those of a real model do.
        dtype: bfloat16, float16 or float32.
        backend: of native_sparse_attention: auto picks the fastest for the device.
        device: cuda, cuda:N, or cpu for a smoke test with tiny lengths.
        check: check every stage first; if one fails, end with status 1 and time nothing.
        check_documents: tokens of each document of the packing that is checked.
        stages: time each stage, and say how far it is from its floor.
        rivals: time full attention.
        time_budget: seconds for the repetitions of one measurement.
        repetitions: the fewest repetitions of one measurement.
        output_dir: where results.json and kernels.png are written.
        overwrite: replace results that are there.

    Returns:
        The exit status: 1 if a check failed, else 0.

    Raises:
        ValueError: a setting that cannot be measured.
    """
    settings = KernelSettings(
        shapes=shapes,
        lengths=lengths,
        documents=documents,
        inputs=inputs,
        dtype=dtype,
        backend=backend,
        device=device,
        check=check,
        check_documents=check_documents,
        stages=stages,
        rivals=rivals,
        time_budget=time_budget,
        repetitions=repetitions,
        output_dir=Path(output_dir),
        overwrite=overwrite,
    )
    return _run(settings)


def _run(settings: KernelSettings) -> int:
    from nsa_lightning.benchmark.plot import draw_times
    from nsa_lightning.benchmark.report import case_tables, check_table, legend, tell_failures
    from nsa_lightning.benchmark.results import environment, measure_and_write

    check_hardware(settings.device, settings.backend)
    where = environment(settings.device)
    print("  ".join(f"{name} {value}" for name, value in where.items() if value), flush=True)
    for name in settings.shapes:
        print(f"\nPlan of shape {name}:\n{_plan(settings, parse_shape(name)).describe()}", flush=True)
    checks, unusable = _check(settings) if settings.check else ([], {})
    if checks:
        print(f"\n{check_table(checks)}", flush=True)
    for (shape, rival, mix), reason in unusable.items():
        print(f"- {shape}: {rival} on documents '{mix}' is left out: {reason}", flush=True)
    if tell_failures("nsa bench kernels", checks):
        return 1
    bench = _prepare(settings)
    run = {"environment": where, "ceilings": bench.ceilings._asdict()}
    measured = _measure(settings, bench, unusable)
    measure_and_write(
        asdict(settings), PLOT_NAME, run, checks, measured, draw_times,
        lambda records: f"{legend(bench.ceilings)}\n\n{case_tables(records)}",
    )  # fmt: skip
    return 0


def _plan(settings: KernelSettings, shape: Shape) -> "Plan":
    """What runs for a shape."""
    import torch
    from nsa_kernels import NSAConfig, plan

    q, v = (
        torch.empty(1, heads, head_dim, dtype=getattr(torch, settings.dtype), device=settings.device)
        for heads, head_dim in ((shape.num_heads, shape.qk_dim), (shape.num_kv_heads, shape.v_dim))
    )
    backend: Any = settings.backend
    return plan(q, v, NSAConfig(), backend)


def _check(settings: KernelSettings) -> "tuple[list[Check], dict[tuple[str, str, str], str]]":
    """The verdict on every stage of every shape; and the rivals that cannot be used, as (shape, rival, mix)."""
    import torch
    from nsa_kernels import NSAConfig

    from nsa_lightning.benchmark.checks import Task, check_stages, unusable_rivals

    device, dtype, config = torch.device(settings.device), getattr(torch, settings.dtype), NSAConfig()
    backend: Any = settings.backend
    checks: list[Check] = []
    unusable: dict[tuple[str, str, str], str] = {}
    for name in settings.shapes:
        shape = parse_shape(name)
        _progress(f"checking shape {name}")
        checks += check_stages(Task(shape, settings.check_documents, config, dtype, device, backend))
        if settings.rivals:
            reasons = unusable_rivals(shape, config, dtype, device)
            unusable |= {(name, rival, mix): r for (rival, mix), r in reasons.items() if mix in settings.documents}
    return checks, unusable


def _prepare(settings: KernelSettings) -> "Bench":
    """Measure the device's rates."""
    import torch
    from nsa_kernels import NSAConfig

    from nsa_lightning.benchmark.measure import Bench
    from nsa_lightning.benchmark.timing import Clock, measure_ceilings, release_memory

    device = torch.device(settings.device)
    clock = Clock(device, settings.time_budget, settings.repetitions)
    ceilings = measure_ceilings(getattr(torch, settings.dtype), clock)
    release_memory()
    backend: Any = settings.backend
    return Bench(backend, NSAConfig(), clock, ceilings)


def _measure(
    settings: KernelSettings, bench: "Bench", unusable: dict[tuple[str, str, str], str]
) -> "Iterator[list[Record]]":
    """The records of one case after another; rivals run with the first kind of inputs only."""
    import torch

    from nsa_lightning.benchmark.inputs import make_inputs
    from nsa_lightning.benchmark.measure import measure_nsa, measure_rival
    from nsa_lightning.benchmark.results import Record
    from nsa_lightning.benchmark.rivals import RIVALS
    from nsa_lightning.benchmark.timing import release_memory, within_memory

    device, dtype = bench.clock.device, getattr(torch, settings.dtype)
    cases = list(_cases(settings))
    for index, case in enumerate(cases):
        _progress(f"case {index + 1} of {len(cases)}: T {case.tokens}, {case.description}")
        kind: Any = case.inputs
        tensors, reason = within_memory(
            lambda case=case, kind=kind: make_inputs(kind, case.shape, case.lengths, bench.config, dtype, device)  # type: ignore[misc]
        )
        if tensors is None:
            yield [Record(case=case, method="nsa", reason=f"inputs: {reason}")]
            continue
        records = list(measure_nsa(bench, case, tensors, settings.stages))
        for rival in RIVALS if settings.rivals and case.inputs == settings.inputs[0] else ():
            known = unusable.get((case.shape.name, rival, case.documents))
            if known is None:
                records.append(measure_rival(bench, case, tensors, rival))
            else:
                records.append(Record(case=case, method=rival, reason=known))
        del tensors
        release_memory()
        yield records


def _cases(settings: KernelSettings) -> "Iterator[Case]":
    from nsa_lightning.benchmark.results import Case

    for shape in map(parse_shape, settings.shapes):
        for documents in settings.documents:
            for kind in settings.inputs:
                for tokens in settings.lengths:
                    mix: Any = documents
                    lengths = document_lengths(mix, tokens)
                    yield Case(shape=shape, tokens=tokens, documents=documents, lengths=lengths, inputs=kind)


def _progress(text: str) -> None:
    print(f"nsa bench kernels: {text}", file=sys.stderr, flush=True)
