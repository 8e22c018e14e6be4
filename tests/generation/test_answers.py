"""Answers that come in any order are told in the order of their prompts, also where Ctrl-C ends them."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsa_lightning.generation.answers import printed_answers, written_answers
from nsa_lightning.generation.generate import Piece
from nsa_lightning.generation.prompts import Prompt

PROMPTS = [Prompt(name, f"{name}?") for name in "abc"]
TEXTS = ["one two", "", "three"]


def come(add, order, cut=None):
    """Hand over the answers a character at a time, in this order of prompts; Ctrl-C comes before piece `cut`."""
    left = [[*text, ""] for text in TEXTS]
    for count, number in enumerate([*order, *(n for n in range(3) for _ in range(9))]):
        if count == cut:
            raise KeyboardInterrupt
        if left[number]:
            text = left[number].pop(0)
            add(Piece(number, text, [], None if left[number] else "end"))


@given(st.lists(st.integers(0, 2), max_size=20))
def test_each_answer_is_printed_whole_under_the_name_of_its_prompt(order):
    out = io.StringIO()
    with printed_answers(PROMPTS, out) as add:
        come(add, order)
    assert out.getvalue() == "==> a <==\none two\n==> b <==\n\n==> c <==\nthree\n"


def test_the_first_answer_is_printed_as_it_comes():
    out = io.StringIO()
    with printed_answers(PROMPTS, out) as add:
        add(Piece(0, "on", [], None))
        add(Piece(2, "three", [], "end"))
        assert out.getvalue() == "==> a <==\non"
        add(Piece(0, "e", [], None))
        assert out.getvalue() == "==> a <==\none"


def test_ctrl_c_prints_what_there_is_of_every_answer_and_once():
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), printed_answers(PROMPTS, out) as add:
        come(add, [0, 2, 0, 2, 2], cut=4)
    assert out.getvalue() == "==> a <==\non\n==> c <==\nth\n"


def test_ctrl_c_leaves_the_answers_that_were_finished_and_no_empty_file(tmp_path):
    for cut, expected in [(2, None), (10, ["c?"]), (None, ["a?", "b?", "c?"])]:
        path = tmp_path / f"{cut}.jsonl"
        try:
            with written_answers(PROMPTS, path) as add:
                come(add, [2] * 6 + [0] * 5, cut)
        except KeyboardInterrupt:
            assert cut is not None
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None
        assert (found and [line["prompt"] for line in found]) == expected
    assert [line["answer"] for line in found] == TEXTS
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_leaves_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), written_answers(PROMPTS, tmp_path / "out.jsonl") as add:
        add(Piece(0, "text", [], "end" if 1 / 0 else None))
    assert not list(tmp_path.iterdir())
