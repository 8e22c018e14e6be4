"""Sampling beside the definitions of its rules, in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_lightning.generation.sampling import Sampler, SamplingConfig, draw, filtered, penalised

VOCAB = 12
LOGITS = st.lists(st.integers(-40, 40), min_size=VOCAB, max_size=VOCAB, unique=True).map(lambda x: [i / 8 for i in x])
CPU = torch.device("cpu")


def softmax(logits):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [weight / sum(weights) for weight in weights]


def kept(logits, config, top_p):
    """The tokens that top_k and top_p leave, by their definitions."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: config.top_k]
    probabilities = softmax([logits[token] / config.temperature for token in order])
    total, chosen = 0.0, set()
    for token, probability in zip(order, probabilities, strict=True):
        chosen.add(token)
        total += probability
        if total >= top_p:
            break
    return chosen


@settings(deadline=None)
@given(LOGITS, st.floats(0.2, 3.0), st.one_of(st.none(), st.integers(1, VOCAB + 3)), st.floats(0.01, 1.0))
def test_top_k_and_top_p_keep_the_fewest_likeliest_tokens(logits, temperature, top_k, top_p):
    config = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
    (left,) = filtered(torch.tensor([logits]), config)
    actual = set(left.isfinite().nonzero().flatten().tolist())
    assert kept(logits, config, top_p - 1e-5) <= actual <= kept(logits, config, top_p + 1e-5)
    ratios = softmax([logits[token] / temperature for token in sorted(actual)])
    torch.testing.assert_close(left[sorted(actual)].softmax(-1), torch.tensor(ratios), rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(LOGITS, st.sets(st.integers(0, VOCAB - 1)), st.floats(0.5, 2.0))
def test_a_penalty_divides_what_is_positive_and_multiplies_what_is_negative(logits, seen, penalty):
    mask = torch.tensor([[token in seen for token in range(VOCAB)]])
    expected = [
        (x / penalty if x > 0 else x * penalty) if token in seen else x for token, x in enumerate(logits)
    ]  # fmt: skip
    torch.testing.assert_close(penalised(torch.tensor([logits]), mask, penalty), torch.tensor([expected]))


@settings(deadline=None)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_cumulative_probability_and_takes_no_token_that_was_left_out(logits, uniform):
    logits = torch.tensor([[*logits, -math.inf]]).roll(3, -1)
    (token,) = draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist()
    reached = logits[0].double().softmax(-1).cumsum(-1)
    assert logits[0, token].isfinite()
    assert reached[token] > uniform * reached[-1]
    assert token == 0 or reached[token - 1] <= uniform * reached[-1]


def test_a_seed_gives_the_same_tokens_in_any_row_of_any_batch_and_another_seed_others():
    logits = torch.randn(40, 3, 50, generator=torch.Generator().manual_seed(0))

    def tokens(seed, rows, row):
        sampler = Sampler(SamplingConfig(seed=seed, top_p=1.0), 3, 50, CPU)
        for other in rows:
            sampler.begin(other, torch.tensor([1]))
        sampler.choose(logits[0][[2]], [2])  # another row that has drawn already
        sampler.begin(row, torch.tensor([1]))
        return [sampler.choose(step[[0] * len(rows)], rows)[rows.index(row)] for step in logits]

    alone = tokens(7, [0], 0)
    assert tokens(7, [0, 1, 2], 1) == alone
    assert tokens(8, [0], 0) != alone


def test_a_penalty_knows_the_prompt_and_the_answer_of_its_own_row_and_forgets_them():
    sampler = Sampler(SamplingConfig(temperature=0, repetition_penalty=10.0), 2, 4, CPU)
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]]).expand(2, 4)
    sampler.begin(0, torch.tensor([0]))
    sampler.begin(1, torch.tensor([1]))
    steps = [sampler.choose(logits, [0, 1]) for _ in range(4)]
    assert [row for row, _ in steps] == [1, 2, 3, 0]
    assert [row for _, row in steps] == [0, 2, 3, 0]
    sampler.begin(0, torch.tensor([2]))
    assert sampler.choose(logits[:1], [0]) == [0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(temperature):
    sampler = Sampler(SamplingConfig(temperature=temperature), 1, 3, CPU)
    sampler.begin(0, torch.tensor([0]))
    with pytest.raises(ValueError, match="model must give finite logits"):
        sampler.choose(torch.tensor([[0.0, math.nan, 1.0]]), [0])


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", math.nan, "a finite number"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.1, "above 0 and at most 1"),
        ("repetition_penalty", 0.0, "above 0"),
        ("seed", -1, "from 0"),
    ],
)
def test_a_value_out_of_range_is_named(setting, value, rule):
    with pytest.raises(ValueError, match=f"{setting} must be {rule}.*, got {value}"):
        SamplingConfig(**{setting: value})
