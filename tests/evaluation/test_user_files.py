"""Tasks of the user's own files: questions, problems and texts."""

import json
from pathlib import Path

import pytest
import torch
from support.evaluation import completion
from support.training import data_module, write_corpus

from nsa_lightning.evaluation.case import Answer
from nsa_lightning.evaluation.positions import PositionTask
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.question_answering import QuestionTask
from nsa_lightning.evaluation.reasoning import ReasoningConfig, ReasoningTask

FORM = completion()


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_questions_are_asked_of_their_context(tmp_path):
    path = jsonl(
        tmp_path / "q.jsonl",
        {"question": "Where is Ann?", "answers": ["Rome", "Roma"], "context": "Ann is in Rome."},
        {"question": "2 + 2 =", "answer": "4"},
    )
    task = QuestionTask(path, 1000, FORM)
    first, second = (planned.build() for planned in task.cases())
    assert FORM.tokenizer.decode(first.prompt).endswith("Ann is in Rome.\n\nQuestion: Where is Ann?\nAnswer:")
    assert (second.answers, FORM.tokenizer.decode(second.prompt)) == (["4"], "2 + 2 =\nAnswer:")
    assert task.score(first, Answer(" in Rome\nQuestion: x", 5, "length")) == {"score": 1.0, "f1": pytest.approx(2 / 3)}
    assert task.score(first, Answer("Paris", 5, "length")) == {"score": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "documents: .*q.jsonl:1 is not a JSON object"),
        ('{"question": "a"}', 'q.jsonl:1 must hold a text, or a list of texts, as "answers"'),
        ('{"answer": "a"}', 'q.jsonl:1 must hold a text as "question"'),
        ("", "documents must hold records"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "q.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        QuestionTask(tmp_path / "q.jsonl", 1000, FORM)


def test_sampled_answers_to_problems_are_compared_as_mathematics(tmp_path):
    pytest.importorskip("math_verify")
    path = jsonl(tmp_path / "p.jsonl", {"problem": "1 / 2 + 1 / 4?", "answer": "3/4"}, {"problem": "x", "answer": 7})
    task = ReasoningTask(path, 200, ReasoningConfig(samples=3, max_new_tokens=[200]), 1000, FORM)
    cases = [planned.build() for planned in task.cases()]
    assert [case.seed for case in cases] == [0, 1, 2, 0, 1, 2]
    assert (task.sampling.temperature, task.sampling.top_p, cases[0].max_new_tokens) == (0.7, 0.95, 200)

    def score(case, text):
        return task.score(case, Answer(text, 1, "end"))["score"]

    assert score(cases[0], "It is 0.5 + 0.25, so $\\boxed{\\frac{3}{4}}$.") == 1.0
    assert score(cases[0], "\\boxed{0.75}") == 1.0
    assert score(cases[0], "\\boxed{\\frac{4}{3}}") == 0.0
    assert score(cases[0], "I do not know") == 0.0
    assert score(cases[3], "The answer is \\boxed{7}.") == 1.0


def test_a_limit_beyond_the_context_is_named(tmp_path):
    pytest.importorskip("math_verify")
    path = jsonl(tmp_path / "p.jsonl", {"problem": "x", "answer": 7})
    with pytest.raises(ValueError, match=r"reasoning.max_new_tokens must be below the 1000 tokens .* got 8192"):
        ReasoningTask(path, 8192, ReasoningConfig(), 1000, FORM)


def test_the_loss_is_told_by_position(tmp_path):
    for index in range(3):
        (tmp_path / f"{index}.txt").write_text(f"text {index} " * (20 if index == 1 else 200))
    task = PositionTask([str(tmp_path / "*.txt")], 2, 600, FORM)
    cases = [planned.build() for planned in task.cases()]
    assert [len(case.prompt) for case in cases] == [600, 600]
    assert [FORM.tokenizer.decode(case.prompt)[:6] for case in cases] == ["text 0", "text 2"]
    nats = torch.cat([torch.full((256,), 3.0), torch.full((256,), 2.0), torch.full((87,), 1.0)])
    scores = task.score(cases[0], Answer("", 0, None, (-nats).tolist()))
    assert scores == pytest.approx({"loss": float(nats.mean()), "loss/0": 3.0, "loss/256": 2.0, "loss/512": 1.0})


def test_the_validation_documents_of_a_prepared_set_are_read(tmp_path):
    write_corpus(tmp_path)
    data = data_module(tmp_path)
    data.prepare_data()
    data.setup("fit")
    (store,) = data.stores
    form = PromptForm(data.tokenizer)
    task = PositionTask([str(store.path)], 1, 60, form)
    (case,) = [planned.build() for planned in task.cases()]
    assert len(case.prompt) == 60
    assert form.tokenizer.decode(case.prompt).startswith("def function_")
    with pytest.raises(ValueError, match="texts must be a set of the model's own tokenizer, got"):
        PositionTask([str(store.path)], 1, 60, FORM)


def test_too_short_texts_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"texts must have 4 documents of the longest of lengths, 600 tokens, got 0"):
        PositionTask([str(tmp_path / "a.txt")], 4, 600, FORM)
    with pytest.raises(ValueError, match=r"texts: data\.sources must match files"):
        PositionTask([str(Path("nowhere"))], 4, 600, FORM)
