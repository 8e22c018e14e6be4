"""The stages that `nsa bench kernels` checks and times on kernels: those that training runs, the joint backward too."""

import pytest
import torch
from nsa_kernels import plan
from nsa_kernels.packing import batch_layout
from support.packings import SMALL, cu_seqlens

from nsa_lightning.benchmark.cases import Shape
from nsa_lightning.benchmark.checks import Task, check_stages
from nsa_lightning.benchmark.inputs import make_inputs
from nsa_lightning.benchmark.measure import Bench, measure_nsa
from nsa_lightning.benchmark.results import REST, WHOLE, Case
from nsa_lightning.benchmark.stages import JOINT, branch_sum, plain_stages, stage_functions
from nsa_lightning.benchmark.timing import Ceilings, Clock, Timing

dispatch = pytest.importorskip("nsa_kernels.triton.dispatch", exc_type=ImportError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")

SHAPE, LENGTHS, CPU = Shape("test", 2, 1, 8, 8), [3, 9], torch.device("cpu")
ATTENTION = ("compressed_attention", "selected_attention", "sliding_attention")


class Once(Clock):
    """Calls what it times a single time, the interpreter being slow."""

    def measure(self, call, before=lambda: None):
        call()
        return Timing(1.0, 1)


def test_each_of_a_step_has_times_and_the_branches_one_backward():
    inputs = make_inputs("random", SHAPE, LENGTHS, SMALL, torch.float32, CPU)
    bench = Bench("triton", SMALL, Once(CPU, 1e-3, 1), Ceilings(1e9, 1e9))
    case = Case(shape=SHAPE, tokens=sum(LENGTHS), documents="mixed", lengths=LENGTHS, inputs="random")
    records = {record.stage: record for record in measure_nsa(bench, case, inputs, True)}
    assert list(records) == [WHOLE, "compress", ATTENTION[0], "block_selection", *ATTENTION[1:], JOINT, REST]
    for stage, record in list(records.items())[:-1]:
        assert record.implementation == "triton"
        assert (record.forward_ms is None) == (record.forward_floor_ms is None) == (stage == JOINT)
        forward_alone = stage in (*ATTENTION, "block_selection")
        assert (record.backward_ms is None) == (record.backward_floor_ms is None) == forward_alone
    joint, whole = records[JOINT], records[WHOLE]
    assert joint.backward_floor_ms < whole.backward_floor_ms
    assert records[REST].backward_ms == whole.backward_ms - joint.backward_ms - records["compress"].backward_ms


def test_the_joint_backward_has_the_gradients_of_separate_ones():
    inputs = make_inputs("random", SHAPE, LENGTHS, SMALL, torch.float32, CPU)
    layout = batch_layout(inputs.cu_seqlens, len(inputs.q), SMALL)
    chosen, exact = plan(inputs.q, inputs.v, SMALL, "triton"), plain_stages("eager", inputs.cu_seqlens, SMALL)
    q, k, v, gates, _ = inputs
    ck, cv = (exact.compress(x).detach().requires_grad_() for x in (k, v))
    with torch.no_grad():
        blocks = exact.block_selection(q, ck, exact.compressed_attention(q, ck, cv)[1])
    out = branch_sum(chosen.stages, inputs, ck, cv, blocks, SMALL, layout)()
    branches = (
        exact.compressed_attention(q, ck, cv)[0],
        exact.selected_attention(q, k, v, blocks)[0],
        exact.sliding_attention(q, k, v)[0],
    )
    expected = sum(gate * o for gate, o in zip(gates.unsqueeze(-1).unbind(2), branches, strict=True))
    torch.testing.assert_close(out, expected)
    leaves = (q, k, v, gates, ck, cv)
    for actual, truth in zip(*(torch.autograd.grad(x.sin().sum(), leaves) for x in (out, expected)), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)
        assert truth.any()


def test_a_check_takes_the_gradients_of_attention_from_the_whole(monkeypatch):
    task = Task(SHAPE, LENGTHS, SMALL, torch.float32, CPU, "triton")
    found = {check.stage: check for check in check_stages(task)}
    assert all(check.passed for check in found.values())
    assert [name for name, check in found.items() if check.gradient_error is not None] == ["compress", "whole"]

    run_gradients = dispatch.run_gradients

    def wrong(*arguments):
        dk, dv = run_gradients(*arguments)
        return dk, 1.01 * dv

    monkeypatch.setattr("nsa_kernels.triton.gated_sum.run_gradients", wrong)
    assert [check.stage for check in check_stages(task) if not check.passed] == ["whole"]


def test_the_reference_has_its_own():
    inputs = make_inputs("random", SHAPE, LENGTHS, SMALL, torch.float32, CPU)
    chosen = plan(inputs.q, inputs.v, SMALL, "reference")
    layout = batch_layout(inputs.cu_seqlens, len(inputs.q), SMALL)
    stages = stage_functions(chosen, cu_seqlens(LENGTHS), SMALL, layout)
    exact = plain_stages("eager", cu_seqlens(LENGTHS), SMALL)
    torch.testing.assert_close(stages.compress(inputs.k), exact.compress(inputs.k))
