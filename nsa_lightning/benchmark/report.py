"""The tables of `nsa bench kernels`, in plain text."""

from collections.abc import Sequence
from itertools import groupby

from nsa_lightning.benchmark.checks import Check
from nsa_lightning.benchmark.measure import NEIGHBOURS
from nsa_lightning.benchmark.results import WHOLE, Record, ratio
from nsa_lightning.benchmark.rivals import RIVALS
from nsa_lightning.benchmark.timing import Ceilings
from nsa_lightning.text_table import number, text_table


def check_table(checks: Sequence[Check]) -> str:
    """One row a checked stage."""
    rows = [
        (
            f"{check.shape} {check.stage}",
            f"{check.output_error:.1e}",
            "-" if check.gradient_error is None else f"{check.gradient_error:.1e}",
            f"{check.bound:.0e}",
            "ok" if check.passed else "FAILED",
            check.note,
        )
        for check in checks
    ]
    title = "Checks: relative error ‖a - b‖ / ‖b‖ beside the eager backend in float32, outputs and worst gradient"
    return title + "\n\n" + text_table(("stage", "output", "gradients", "bound", "", "note"), rows)


def failed_checks(checks: Sequence[Check]) -> tuple[str, ...]:
    """The checks that failed, each by its shape and stage."""
    return tuple(f"{check.shape} {check.stage}" for check in checks if not check.passed)


def legend(ceilings: Ceilings) -> str:
    """How to read the tables, and the measured rates behind the floors."""
    return (
        "Times in ms, forward and backward; vs: how many times as fast; GiB: peak memory; union: distinct blocks that "
        f"{', '.join(map(str, NEIGHBOURS))} neighbouring queries select.\n"
        f"Floors: work at {ceilings.matmul_flops / 1e12:.3g} TFLOP/s (measured matrix product), "
        f"{ceilings.copy_bytes / 1e9:.4g} GB/s (measured copy)"
    )


def case_tables(records: Sequence[Record]) -> str:
    """For every shape, inputs and document mix: NSA beside its rivals, then its stages beside their floors."""
    ours = [record for record in records if record.method == "nsa"]
    blocks = []
    for description, group in groupby(ours, key=lambda record: record.case.description):
        case_records = list(group)
        wholes = [record for record in case_records if record.stage == WHOLE]
        stages = [record for record in case_records if record.forward_floor_ms or record.backward_floor_ms]
        modules = dict.fromkeys(record.implementation for record in wholes if record.implementation)
        blocks.append(f"{description}; {', '.join(modules)}\n\n{_whole_table(wholes, records)}")
        if len(stages) > len(wholes):
            blocks.append(_stage_table(stages))
        blocks.extend(_reasons(wholes, case_records, records))
    return "\n\n".join(blocks)


def _rival_of(record: Record, rival: str, records: Sequence[Record]) -> Record | None:
    """The rival's measurement on the same documents; its time does not depend on what the numbers are."""
    case = record.case
    return next(
        (
            other
            for other in records
            if other.method == rival
            and (other.case.shape, other.case.tokens, other.case.documents) == (case.shape, case.tokens, case.documents)
        ),
        None,
    )


def _whole_table(wholes: Sequence[Record], records: Sequence[Record]) -> str:
    found = {rival: [_rival_of(whole, rival, records) for whole in wholes] for rival in RIVALS}
    rivals = [rival for rival, some in found.items() if any(one and one.forward_ms for one in some)]
    header = ["T", *(title for method in ("nsa", *rivals) for title in (f"{method} fwd", "bwd"))]
    header += [title for rival in rivals for title in (f"vs {rival} fwd", "bwd")]
    header += [*(f"{method} GiB" for method in ("nsa", *rivals)), f"union {'/'.join(map(str, NEIGHBOURS))}"]
    rows = []
    for whole in wholes:
        others = [_rival_of(whole, rival, records) or Record(case=whole.case, method=rival) for rival in rivals]
        row = [str(whole.case.tokens)]
        row += [number(value) for one in (whole, *others) for value in (one.forward_ms, one.backward_ms)]
        for other in others:
            row.append(number(ratio(other.forward_ms, whole.forward_ms), "x"))
            row.append(number(ratio(other.backward_ms, whole.backward_ms), "x"))
        row += [number(one.peak_gib) for one in (whole, *others)]
        row.append("/".join(number(whole.unions.get(neighbours)) for neighbours in NEIGHBOURS))
        rows.append(row)
    return text_table(header, rows)


def _stage_table(records: Sequence[Record]) -> str:
    header = ("T, stage of nsa", "fwd", "floor", "ratio", "bwd", "floor", "ratio")
    rows = []
    for record in records:
        row = [f"{record.case.tokens:<7} {record.stage}"]
        for ms, floor in (
            (record.forward_ms, record.forward_floor_ms),
            (record.backward_ms, record.backward_floor_ms),
        ):
            row += [number(ms), number(floor), number(ratio(ms, floor) if ms is not None and ms > 0 else None)]
        rows.append(row)
    return text_table(header, rows)


def _reasons(wholes: Sequence[Record], ours: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """Why times are missing, a line for each method, stage and reason."""
    rivals = [_rival_of(whole, rival, records) for rival in RIVALS for whole in wholes]
    lines: dict[str, list[str]] = {}
    for record in [*ours, *(rival for rival in rivals if rival is not None)]:
        if record.reason is not None:
            name = record.method if record.stage == WHOLE else f"{record.method} {record.stage}"
            lines.setdefault(f"{name}: {record.reason}", []).append(str(record.case.tokens))
    return ["\n".join(f"- at T {', '.join(tokens)}, {text}" for text, tokens in lines.items())] if lines else []
