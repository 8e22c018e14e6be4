"""Tasks of lm-evaluation-harness on local files: a model with fixed answers gets the score that is computed by hand."""

import json
import sys

import pytest
from support.evaluation import completion

pytest.importorskip("lm_eval")

from nsa_cli.main import main
from support.dense import write_source

from nsa_lightning.evaluation.case import Answer
from nsa_lightning.evaluation.lm_eval_model import EvaluatedLM
from nsa_lightning.evaluation.lm_eval_tasks import LmEvalConfig, LmEvalSuite
from nsa_lightning.evaluation.results import ResultFile

pytestmark = pytest.mark.slow

FORM = completion()

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["one", "two"]
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
ANSWERS = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answers.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: {{{{question}}}} A:"
doc_to_target: answer
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
TEXTS = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    """Nothing is looked for elsewhere."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    """Task files with their questions."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, text in {"choices": CHOICES, "answers": ANSWERS, "texts": TEXTS}.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    choices = [{"question": f"{number}?", "answer": number % 2} for number in range(4)]
    answers = [{"question": "a", "answer": "x"}, {"question": "b", "answer": "y"}]
    for name, records in {"choices": choices, "answers": answers, "texts": [{"text": "some text " * 30}]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def score(folder, task, ask, **settings):
    suite = LmEvalSuite([task], LmEvalConfig(tasks_dir=str(folder), **settings), 200, FORM)
    (result,) = suite.run(suite.tasks, ask)
    return result


def test_a_model_that_always_says_two_gets_half_of_the_choices(tasks_dir):
    def ask(cases, stop, sampling):
        texts = {name: FORM.tokenizer.decode(case.expected).strip() for name, case in cases.items()}
        assert set(texts.values()) == {"one", "two"}
        return {name: Answer("", 0, None, [-1.0 if text == "two" else -2.0], True) for name, text in texts.items()}

    result = score(tasks_dir, "tiny_choices", ask)
    assert (result.task, result.scores["score"], result.cases) == ("lm_eval_tiny_choices", 0.5, 4)
    assert score(tasks_dir, "tiny_choices", ask, limit=1).scores["score"] == 0.0


def test_a_model_that_always_writes_x_is_right_once_of_twice(tasks_dir):
    asked = []

    def ask(cases, stop, sampling):
        asked.extend((FORM.tokenizer.decode(case.prompt), case.max_new_tokens) for case in cases.values())
        assert (list(stop.stop), sampling.temperature) == (["\n"], 0)
        return {name: Answer("x", 1, "stop") for name in cases}

    assert score(tasks_dir, "tiny_answers", ask).scores["score"] == 0.5
    assert asked == [("Q: a A:", 12), ("Q: b A:", 12)]


def test_a_whole_text_is_scored_in_windows_of_the_context(tasks_dir):
    asked = []

    def ask(cases, stop, sampling):
        asked.extend(cases.values())
        return {name: Answer("", 0, None, [-float(len(case.expected))]) for name, case in cases.items()}

    scores = score(tasks_dir, "tiny_texts", ask).scores
    text = "some text " * 30
    tokens = FORM.tokenizer.encode_prompt(text, start=False)
    assert [token for case in asked for token in case.expected] == tokens
    assert asked[0].prompt == [FORM.tokenizer.end_of_text_id]
    assert scores["score"] == pytest.approx(len(tokens) / len(text) / 0.6931472)


def test_a_request_beyond_the_context_loses_its_beginning():
    seen = []

    def ask(cases, stop, sampling):
        seen.extend(cases.values())
        return {name: Answer("", 0, None, [0.0]) for name in cases}

    model = EvaluatedLM(ask, FORM, 10)
    model._loglikelihood_tokens([(("", ""), list(range(20)), [50, 51, 52])])
    assert (seen[0].prompt, seen[0].expected) == ([12, 13, 14, 15, 16, 17, 18, 19], [50, 51, 52])


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["nothing_such"], {}, "tasks: lm_eval has no task nothing_such"),
        (["humaneval"], {}, "lm_eval.run_generated_code must be true for humaneval"),
        (["mmlu"], {"limit": 0}, "lm_eval.limit must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_run_is_named(names, settings, message):
    with pytest.raises(ValueError, match=message):
        LmEvalSuite(names, LmEvalConfig(**settings), 200, FORM)


def test_the_paper_s_general_tasks_have_its_examples():
    suite = LmEvalSuite(["paper_general"], LmEvalConfig(run_generated_code=True), 200, FORM)
    shots = {task.removeprefix("lm_eval_"): suite.settings(task)["shots"] for task in suite.tasks}
    assert list(shots.values()) == [5, 5, 5, 3, 8, 4, 1, 3, 0]


def test_the_command_goes_on_with_the_requests_that_it_has(tasks_dir, tmp_path, monkeypatch, capsys):
    write_source(tmp_path / "dense", "llama_tied", tokenizer=True)
    words = [
        "--model",
        tmp_path / "dense",
        "--tasks",
        "lm_eval:tiny_choices,tiny_answers",
        "--lm_eval.tasks_dir",
        tasks_dir,
    ]
    words += ["--device", "cpu"]

    def run(output):
        monkeypatch.setattr(sys, "argv", ["nsa", "evaluate", *map(str, [*words, "--output_dir", tmp_path / output])])
        return main()

    assert run("whole") == 0
    add = ResultFile.add

    def add_five(self, result):
        add(self, result)
        if len(self.cases) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ResultFile, "add", add_five)
    assert run("killed") == 130
    monkeypatch.setattr(ResultFile, "add", add)
    assert run("killed") == 0
    rows = {name: json.loads((tmp_path / name / "summary.json").read_text())["rows"] for name in ("whole", "killed")}
    assert rows["whole"] == rows["killed"]
    assert [row["task"] for row in rows["whole"]] == ["lm_eval_tiny_choices", "lm_eval_tiny_answers"]
    lines = (tmp_path / "killed" / "cases.jsonl").read_text().splitlines()
    names = [json.loads(line)["case"] for line in lines]
    assert len(names) == 8 + 2 + 2
    assert len(set(names)) == len(names) - 1  # both means
    assert "lm_eval_tiny_choices" in capsys.readouterr().out
