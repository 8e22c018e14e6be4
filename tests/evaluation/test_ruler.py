"""RULER's other tasks by hand: chains of variables, common words, frequent words."""

from collections import Counter

import pytest
from support.evaluation import completion

from nsa_lightning.evaluation.case import Answer
from nsa_lightning.evaluation.ruler import RulerConfig, RulerTask

FORM = completion()


def built(kind, length=2500, **settings):
    """The first case of a task, its text, and the task."""
    task = RulerTask(kind, RulerConfig(**settings), [length], FORM)
    case = task.cases()[0].build()
    return case, FORM.tokenizer.decode(case.prompt), task


@pytest.mark.parametrize("kind", ["variables", "common_words", "frequent_words"])
def test_prompt_and_answer_fill_the_length(kind):
    case, _, task = built(kind, 6000)
    assert 5800 < len(case.prompt) + case.max_new_tokens <= 6000
    assert len(task.cases()) == 5
    assert built(kind, 6000)[0] == case
    assert task.score(case, Answer(", ".join(case.answers[:1]), 3, "end"))["score"] == 1 / len(case.answers)


def test_a_chain_leads_from_the_value_to_every_variable_in_order():
    case, text, _ = built("variables", chains=2, hops=3)
    value = text.split("assigned the value ")[1].split(" ")[0]
    holding, names = {value}, []
    for line in text.splitlines():
        if line.startswith("VAR "):
            name, _, source = line.removeprefix("VAR ").partition(" = ")
            if source.removeprefix("VAR ") in holding:
                holding.add(name)
                names.append(name)
    assert names == case.answers
    assert len(names) == 4
    assert text.count("VAR ") == 8 + 6


def test_the_ten_common_words_stand_thirty_times_and_the_others_three():
    case, text, _ = built("common_words", 9000)
    listed = text.split("most often.\n")[1].split("\nQuestion")[0]
    counts = Counter(word for word in listed.split() if not word.endswith("."))
    assert {word for word, count in counts.items() if count == 30} == set(case.answers)
    assert len(case.answers) == 10
    assert {count for word, count in counts.items() if word not in case.answers} == {3}


def test_the_three_frequent_words_stand_most_often():
    case, text, _ = built("frequent_words")
    coded = text.split("coded words. ")[1].split("\nQuestion")[0]
    counts = Counter(word for word in coded.split() if word != "...").most_common(4)
    assert [word for word, _ in counts[:3]] == case.answers
    assert counts[2][1] > counts[3][1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hops": 0}, "ruler.hops must be at least 1, got 0"), ({"exponent": 1.0}, "ruler.exponent must be above 1")],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RulerConfig(**settings)


def test_a_length_without_room_is_named():
    with pytest.raises(ValueError, match="lengths must leave room for the question and its answer, got 300"):
        built("common_words", 300)
