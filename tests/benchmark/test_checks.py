import pytest
import torch
from nsa_kernels import eager
from support.packings import SMALL, cu_seqlens

from nsa_lightning.benchmark import checks
from nsa_lightning.benchmark.cases import Shape
from nsa_lightning.benchmark.checks import Task, check_stages, relative_error, selection_gap
from nsa_lightning.benchmark.stages import plain_stages, stage_functions

SHAPE = Shape("test", 4, 2, 8, 8)
TASK = Task(SHAPE, [1, 40, 70, 5], SMALL, torch.float32, torch.device("cpu"), "eager")
EAGER = plain_stages("eager", cu_seqlens(TASK.lengths), SMALL)
STAGES = ("compress", "compressed_attention", "block_selection", "selected_attention", "sliding_attention")


def verdicts(**replaced):
    """Stage -> passed, with some stages of the eager backend replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checks, "stage_functions", lambda *arguments: stage_functions(*arguments)._replace(**replaced))
        return {check.stage: check.passed for check in check_stages(TASK)}


def test_right_stages_pass():
    assert verdicts() == dict.fromkeys((*STAGES, "whole"), True)


def wrong_output(*arguments):
    o, lse = EAGER.sliding_attention(*arguments)
    return o * 1.01, lse


def wrong_gradient(*arguments):
    o, lse = EAGER.selected_attention(*arguments)
    return o + 0.01 * (o - o.detach()), lse


def not_finite(*arguments):
    return EAGER.compress(*arguments) * float("nan")


def worst_blocks(q, *arguments):
    return EAGER.block_selection(-q, *arguments)


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ("sliding_attention", wrong_output),
        ("selected_attention", wrong_gradient),
        ("compress", not_finite),
        ("block_selection", worst_blocks),
    ],
)
def test_a_wrong_stage_fails_and_no_other(stage, wrong):
    failed = [name for name, passed in verdicts(**{stage: wrong}).items() if not passed]
    assert failed == [stage]


def selection_case():
    generator = torch.Generator().manual_seed(0)
    offsets = cu_seqlens([9, 100])
    q, k = (torch.randn(109, heads, 8, generator=generator) for heads in (4, 2))
    ck = eager.compress(k, offsets, SMALL)
    _, lse = eager.compressed_attention(q, ck, ck, offsets, SMALL)
    return q, ck, lse, offsets, eager.block_selection(q, ck, lse, offsets, SMALL)


def test_an_equally_good_choice_passes_and_a_worse_one_is_measured():
    q, ck, lse, offsets, blocks = selection_case()
    ck = torch.zeros_like(ck)  # every inner block is as important as any other
    flat = eager.compressed_attention(q, ck, ck, offsets, SMALL)[1]
    expected = eager.block_selection(q, ck, flat, offsets, SMALL)
    other = expected.clone()
    assert other[-1, 0].tolist() == [0, 1, 11, 12]  # position 99: the first, the best free one, the last two
    other[-1, 0, 1] = 5
    gap, differing = selection_gap(other, expected, q, ck, flat, offsets, SMALL)
    assert gap < 1e-6
    assert differing == pytest.approx(1 / 218)
    worse = eager.block_selection(-q, selection_case()[1], lse, offsets, SMALL)
    assert selection_gap(worse, blocks, q, selection_case()[1], lse, offsets, SMALL)[0] > 0.1


@pytest.mark.parametrize(
    "row",
    [[0, 1, 11, 11], [1, 0, 11, 12], [0, 11, 12, -1], [0, 1, 2, 12], [0, 1, 12, 13], [0, 1, 12, 99], [0, -1, 11, 12]],
    ids=["twice", "unordered", "too_few", "forced_one_missing", "in_the_future", "out_of_range", "hole"],
)
def test_an_impossible_choice_fails(row):
    q, ck, lse, offsets, blocks = selection_case()
    chosen = blocks.clone()
    chosen[-1, 0] = torch.tensor(row, dtype=torch.int32)
    assert selection_gap(chosen, blocks, q, ck, lse, offsets, SMALL)[0] == float("inf")


def test_relative_error_of_what_is_not_finite_or_of_another_shape_is_infinite():
    x = torch.ones(3)
    assert relative_error(x * 1.5, x) == pytest.approx(0.5)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), x) == float("inf")
    assert relative_error(x[:2], x) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
