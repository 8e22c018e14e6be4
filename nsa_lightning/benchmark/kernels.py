"""`nsa bench kernels`: check every stage, then time NSA beside PyTorch's full attention."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nsa_lightning.benchmark.cases import (
    PLOT_NAME,
    KernelSettings,
    Shape,
    document_lengths,
    parse_shape,
)
from nsa_lightning.benchmark.hardware import check_hardware
from nsa_lightning.benchmark.results import Case, Outcome, Record, Report, environment, measure_and_write

if TYPE_CHECKING:  # torch takes seconds to import, `--help` does not
    from nsa_kernels import Plan

    from nsa_lightning.benchmark.checks import Check
    from nsa_lightning.benchmark.measure import Bench


def bench_kernels(settings: KernelSettings, report: Report, progress: Report) -> Outcome:
    """Check each stage beside the eager backend, then time NSA beside full attention, and write what was found.

    Args:
        settings: what is measured.
        report: is told the device, the plan of every shape and the verdicts of the checks, before anything is timed.
        progress: is told what is done next.

    Raises:
        ValueError: the device or the backend is not there.
    """
    from nsa_lightning.benchmark.plot import draw_times
    from nsa_lightning.benchmark.report import case_tables, check_table, failed_checks, legend

    check_hardware(settings.device, settings.backend)
    where = environment(settings.device)
    report("  ".join(f"{name} {value}" for name, value in where.items() if value))
    for name in settings.shapes:
        report(f"\nPlan of shape {name}:\n{_plan(settings, parse_shape(name)).describe()}")
    checks, unusable = _check(settings, progress) if settings.check else ([], {})
    if checks:
        report(f"\n{check_table(checks)}")
    for (shape, rival, mix), reason in unusable.items():
        report(f"- {shape}: {rival} on documents '{mix}' is left out: {reason}")
    if failed := failed_checks(checks):
        return Outcome("", failed=failed)
    bench = _prepare(settings)
    run = {"environment": where, "ceilings": bench.ceilings._asdict()}
    measured = _measure(settings, bench, unusable, progress)
    return measure_and_write(
        asdict(settings), PLOT_NAME, run, checks, measured, draw_times,
        lambda records: f"\n{legend(bench.ceilings)}\n\n{case_tables(records)}",
    )  # fmt: skip


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


def _check(settings: KernelSettings, progress: Report) -> "tuple[list[Check], dict[tuple[str, str, str], str]]":
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
        progress(f"checking shape {name}")
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
    settings: KernelSettings, bench: "Bench", unusable: dict[tuple[str, str, str], str], progress: Report
) -> Iterator[list[Record]]:
    """The records of one case after another; rivals run with the first kind of inputs only."""
    import torch

    from nsa_lightning.benchmark.inputs import make_inputs
    from nsa_lightning.benchmark.measure import measure_nsa, measure_rival
    from nsa_lightning.benchmark.rivals import RIVALS
    from nsa_lightning.benchmark.timing import release_memory, within_memory

    device, dtype = bench.clock.device, getattr(torch, settings.dtype)
    cases = list(_cases(settings))
    for index, case in enumerate(cases):
        progress(f"case {index + 1} of {len(cases)}: T {case.tokens}, {case.description}")
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


def _cases(settings: KernelSettings) -> Iterator[Case]:
    for shape in map(parse_shape, settings.shapes):
        for documents in settings.documents:
            for kind in settings.inputs:
                for tokens in settings.lengths:
                    mix: Any = documents
                    lengths = document_lengths(mix, tokens)
                    yield Case(shape=shape, tokens=tokens, documents=documents, lengths=lengths, inputs=kind)
