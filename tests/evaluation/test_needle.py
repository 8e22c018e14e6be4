"""Needles by hand: where they stand, how long the text is, what is asked and what counts as found."""

import pytest
from support.evaluation import completion

from nsa_lightning.evaluation.case import Answer
from nsa_lightning.evaluation.haystack import Haystack, fit_sentences
from nsa_lightning.evaluation.needle import NeedleConfig, NeedleTask
from nsa_lightning.evaluation.scores import any_found, share_found

FORM = completion()


def built(family, length=1500, depth=0.5, **settings):
    """The only case of a task, and its text."""
    config = NeedleConfig(families=[family], depths=[depth], **settings)
    (planned,) = NeedleTask(family, config, [length], FORM).cases()
    case = planned.build()
    return case, FORM.tokenizer.decode(case.prompt)


@pytest.mark.parametrize("length", [1000, 2500])
@pytest.mark.parametrize("haystack", ["filler", "repeat"])
def test_prompt_and_answer_fill_the_length(length, haystack):
    case, _ = built("single", length, haystack=haystack)
    longest_sentence = 80
    assert length - longest_sentence < len(case.prompt) + case.max_new_tokens <= length
    assert len(case.expected) <= case.max_new_tokens


@pytest.mark.parametrize(("depth", "before", "after"), [(0.0, 0, 1), (0.5, 0.5, 0.5), (1.0, 1, 0)])
def test_the_needle_stands_at_its_depth(depth, before, after):
    case, text = built("single", depth=depth)
    (value,) = case.answers
    body = text.split("afterwards.\n")[1].split("\nWhat is")[0]
    needle = f"One of the special magic numbers for {text.split(' for ')[-1].split(' mentioned')[0]} is: {value}."
    first, second = body.split(needle)
    sentences = body.replace(needle, "").count(".")
    assert first.count(".") == pytest.approx(before * sentences, abs=1)
    assert second.count(".") == pytest.approx(after * sentences, abs=1)
    assert text.count(value) == 1


def test_the_expected_answer_is_the_value_behind_the_prompt():
    case, text = built("single")
    assert text.endswith(" mentioned in the provided text is")
    assert FORM.tokenizer.decode([*case.prompt, *case.expected]) == f"{text} {case.answers[0]}"
    assert len(case.answers[0]) == 7


def test_each_family_hides_and_asks_what_it_says():
    needle = "One of the special magic numbers for "
    multikey, text = built("multikey", needles=3)
    assert (text.count(needle), len(multikey.answers)) == (3, 1)
    multivalue, text = built("multivalue", needles=3)
    assert (text.count(needle), len(multivalue.answers)) == (3, 3)
    assert len({part.split(" is: ")[0] for part in text.split(needle)[1:]}) == 1
    multiquery, text = built("multiquery", needles=3)
    assert (text.count(needle), len(set(multiquery.answers))) == (3, 3)
    pairs = [part.split(". ")[0].split(" is: ") for part in text.split(needle)[1:]]
    values = {key: value.split(".")[0] for key, value in pairs}
    asked = text.split("numbers for ")[-1].split(" mentioned")[0].replace(" and ", ", ").split(", ")
    assert [values[key] for key in asked] == list(multiquery.answers)


def test_a_seed_means_the_same_text_and_another_one_another():
    assert built("multikey") == built("multikey")
    assert built("multikey")[0].answers != built("multikey", seed=1)[0].answers


def test_values_are_of_the_wanted_kind():
    assert "-" in built("single", values="word")[0].answers[0]
    assert len(built("single", values="uuid")[0].answers[0]) == 36


def test_a_text_of_the_user_is_the_haystack_and_begins_anew(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("First of all. Then 3.5 more! And why?\nBecause")
    haystack = Haystack(str(path), seed=0)
    assert haystack.sentences(6)[:2] == ["First of all.", "Then 3."]
    assert haystack.sentences(7)[-2:] == ["First of all.", "Then 3."]
    assert haystack.identity != Haystack("filler", seed=0).identity


@pytest.mark.parametrize("slope", [1, 7, 40])
def test_the_most_pieces_that_fit_are_found(slope):
    asked = []

    def count(pieces):
        asked.append(pieces)
        return 30 + slope * pieces + pieces % 3

    found = fit_sentences(count, 1000)
    assert count(found) <= 1000 < count(found + 1)
    assert len(asked) < 15
    assert fit_sentences(lambda pieces: 2000, 1000) == 0


def test_found_values_are_counted():
    assert share_found(["12", "34", "ab"], "it is 12 and AB") == pytest.approx(2 / 3)
    assert (any_found(["12", "34"], "it is 12"), any_found(["12"], "no")) == (1.0, 0.0)
    task = NeedleTask("multivalue", NeedleConfig(needles=2), [1000], FORM)
    case = task.cases()[0].build()
    answer = Answer(f"{case.answers[1]}, of course", 5, "length", [-1.0, -3.0])
    assert task.score(case, answer) == {"score": 0.5, "log_probability": -2.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ["many"]}, "needle.families must be .*many"),
        ({"families": []}, "must not be empty"),
        ({"depths": [0.5, 1.5]}, r"needle.depths must be from 0 to 1, got \[0.5, 1.5\]"),
        ({"needles": 0}, "needle.needles must be at least 1, got 0"),
        ({"haystack": "nowhere.txt"}, "haystack must be one of filler, repeat or a text file, got nowhere.txt"),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        NeedleTask("single", NeedleConfig(**settings), [1000], FORM)
