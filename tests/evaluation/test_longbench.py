"""LongBench from tiny files in its published layout, with scores that can be computed by hand."""

import json
import zipfile

import pytest
from support.evaluation import completion

from nsa_lightning.evaluation.case import Answer
from nsa_lightning.evaluation.longbench import LongBenchConfig, longbench_tasks
from nsa_lightning.evaluation.longbench_metrics import METRICS, class_found, line_similarity, number_found

FORM = completion()


def record(context, question, answers, classes=None):
    """One line as it is published."""
    return {
        "input": question, "context": context, "answers": answers, "length": len(context), "dataset": "x",
        "language": "en", "all_classes": classes, "_id": "0",
    }  # fmt: skip


RECORDS = {
    "hotpotqa": [record("Passage 1: Ann lives in Rome.", "Where does Ann live?", ["Rome, Italy", "Rome"])],
    "trec": [record("Question: a\nType: Food", "Question: b\nType:", ["Food"], ["Food", "Sport"])],
    "lcc": [record("def f(x):\n    return x\n\ndef g(x):\n", "", ["    return f(x)"])],
    "passage_retrieval_en": [record("Paragraph 1: a\n\nParagraph 2: b", "b", ["Paragraph 2"])],
}


def write(folder):
    folder.mkdir(parents=True)
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def task_of(folder, dataset, max_length=4000, **settings):
    (task,) = longbench_tasks(folder, LongBenchConfig(datasets=[dataset], **settings), max_length, FORM)
    return task


def scored(task, text):
    case = task.cases()[0].build()
    return task.score(case, Answer(text, 1, "end"))["score"]


@pytest.mark.parametrize("layout", ["directory", "data", "archive", "zip"])
def test_every_published_layout_is_read(tmp_path, layout):
    files = write(tmp_path / "files" / "data")
    if layout in ("archive", "zip"):
        with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
            for path in files.iterdir():
                archive.write(path, f"data/{path.name}")
    place = {"directory": files, "data": files.parent, "archive": tmp_path, "zip": tmp_path / "data.zip"}[layout]
    tasks = longbench_tasks(place, LongBenchConfig(), 4000, FORM)
    assert [task.name.removeprefix("longbench_") for task in tasks] == [name for name in METRICS if name in RECORDS]
    assert [len(task.cases()) for task in tasks] == [1, 1, 1, 1]


def test_a_prompt_is_the_published_one(tmp_path):
    case = task_of(write(tmp_path / "files"), "hotpotqa").cases()[0].build()
    text = FORM.tokenizer.decode(case.prompt)
    assert text.startswith("Answer the question based on the given passages. Only give me the answer")
    assert "\nPassage 1: Ann lives in Rome.\n" in text
    assert text.endswith("Question: Where does Ann live?\nAnswer:")
    assert (case.max_new_tokens, case.answers) == (32, ["Rome, Italy", "Rome"])


def test_a_long_prompt_loses_its_middle(tmp_path):
    folder = write(tmp_path / "files")
    lines = [f"Passage {i}: nothing." for i in range(400)]
    (folder / "hotpotqa.jsonl").write_text(json.dumps(record("\n".join(lines), "Who?", ["x"])) + "\n")
    case = task_of(folder, "hotpotqa", 600).cases()[0].build()
    text = FORM.tokenizer.decode(case.prompt)
    assert 540 < len(case.prompt) <= 600 - 32
    assert text.startswith("Answer the question based")
    assert text.endswith("Question: Who?\nAnswer:")
    assert "Passage 200:" not in text


def test_the_best_right_answer_counts(tmp_path):
    task = task_of(write(tmp_path / "files"), "hotpotqa")
    assert scored(task, " The Rome!") == 1.0
    assert scored(task, "in Rome, of Italy") == pytest.approx(2 * 2 / (4 + 2))  # 2 common words of 4 and 2
    assert scored(task, "Paris") == 0.0


def test_only_the_first_line_counts_after_examples(tmp_path):
    task = task_of(write(tmp_path / "files"), "trec")
    assert scored(task, "\nFood\nQuestion: c\nType: Sport") == 1.0
    assert scored(task, "Food or Sport") == 0.5
    assert scored(task, "Sport\nFood") == 0.0


def test_code_is_compared_by_its_first_line(tmp_path):
    task = task_of(write(tmp_path / "files"), "lcc")
    assert scored(task, "\n    return f(x)\nmore") == 1.0
    assert scored(task, "# a comment\n    return f(x)") == 1.0
    assert line_similarity("abcd", "abxd", ()) == 0.75
    assert line_similarity("", "abxd", ()) == 0.0


def test_numbers_are_counted():
    assert number_found("Paragraph 2, not 3", "Paragraph 2", ()) == 0.5
    assert number_found("12", "12", ()) == 1.0
    assert number_found("none", "段落3", ()) == 0.0


def test_a_class_within_the_right_one_is_left_out_as_published():
    assert class_found("Food product", "Food product", ["Food", "Food product"]) == 1.0
    assert class_found("Food", "Food product", ["Food", "Food product"]) == 0.0


def test_chinese_is_cut_into_words():
    pytest.importorskip("jieba")
    assert METRICS["multifieldqa_zh"]("北京大学。", "北京大学", ()) == 1.0
    assert METRICS["multifieldqa_zh"]("我在上海", "北京大学", ()) == 0.0


def test_rouge_l_is_the_published_one():
    pytest.importorskip("rouge")
    assert METRICS["gov_report"]("a b c d", "a b x d", ()) == pytest.approx(0.75, abs=1e-6)
    assert METRICS["gov_report"]("a. b c.", "b c. a.", ()) == pytest.approx(1.0, abs=1e-6)
    assert METRICS["gov_report"]("", "a b", ()) == 0.0
    pytest.importorskip("jieba")
    assert METRICS["dureader"]("我来到北京", "我来到北京", ()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": ["nothing"]}, "longbench.datasets must be of narrativeqa, .* got nothing"),
        ({"datasets": ["qasper"]}, "longbench_dir must be a directory of LongBench with qasper.jsonl"),
        ({"limit": 0}, "longbench.limit must be at least 1, got 0"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, settings, message):
    folder = write(tmp_path / "files")
    with pytest.raises(ValueError, match=message):
        longbench_tasks(folder, LongBenchConfig(**settings), 4000, FORM)


def test_a_directory_without_its_files_is_named(tmp_path):
    with pytest.raises(ValueError, match="longbench_dir must be a directory of LongBench with files such as hotpotqa"):
        longbench_tasks(tmp_path, LongBenchConfig(), 4000, FORM)
    (tmp_path / "lcc.jsonl").write_text('{"context": "a", "input": ""}\n')
    with pytest.raises(ValueError, match=r"longbench_dir: lcc.jsonl:1 must hold texts as context and input"):
        longbench_tasks(tmp_path, LongBenchConfig(), 4000, FORM)
