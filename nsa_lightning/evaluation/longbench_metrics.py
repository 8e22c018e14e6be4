"""How LongBench counts answers (arXiv:2308.14508): each metric as its authors published it.

ROUGE-L is that of the package `rouge`, Chinese is cut into words by `jieba`: other implementations give other numbers.
"""

import difflib
import re
import string
from collections.abc import Callable, Sequence

from nsa_lightning.evaluation.scores import overlap_f1, question_f1

_CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
_DROPPED = str.maketrans("", "", string.punctuation + _CHINESE_PUNCTUATION)

Metric = Callable[[str, str, Sequence[str]], float]
"""From an answer, a right one and all classes of the dataset to a score from 0 to 1."""


def english_f1(answer: str, right: str, classes: Sequence[str]) -> float:
    """F1 of the words."""
    return question_f1(answer, right)


def chinese_f1(answer: str, right: str, classes: Sequence[str]) -> float:
    """F1 of the words that `jieba` finds, without punctuation."""
    return overlap_f1(_chinese_words(answer), _chinese_words(right))


def rouge_l(answer: str, right: str, classes: Sequence[str]) -> float:
    """F of ROUGE-L over the sentences of a summary; 0 where there is none."""
    from rouge import Rouge

    try:
        return float(Rouge(metrics=["rouge-l"]).get_scores(answer, right)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):  # an empty answer, or a sentence of a thousand words: published as 0
        return 0.0


def chinese_rouge_l(answer: str, right: str, classes: Sequence[str]) -> float:
    """ROUGE-L of the words that `jieba` finds."""
    import jieba

    found, wanted = (" ".join(jieba.cut(text, cut_all=False)) for text in (answer, right))
    return rouge_l(found, wanted, classes)


def class_found(answer: str, right: str, classes: Sequence[str]) -> float:
    """One by the number of classes that the answer names, where the right one is among them."""
    named = [name for name in classes if name in answer]
    place = 0
    while place < len(named):
        if named[place] in right and named[place] != right:
            del named[place]
        place += 1  # also behind one that was taken out, as the published loop does
    return 1 / len(named) if right in named else 0.0


def number_found(answer: str, right: str, classes: Sequence[str]) -> float:
    """The share of the answer's numbers that are the right one, which is the first number of `right`."""
    wanted = re.findall(r"\d+", right)[0]
    numbers = re.findall(r"\d+", answer)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def line_similarity(answer: str, right: str, classes: Sequence[str]) -> float:
    """How alike the first line of code is, in whole percents (`ratio` of fuzzywuzzy)."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not right:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, right).ratio()) / 100


def _chinese_words(text: str) -> list[str]:
    import jieba

    cleaned = ("".join(word.lower().translate(_DROPPED).split()) for word in jieba.cut(text, cut_all=False))
    return [word for word in cleaned if word]


METRICS: dict[str, Metric] = {
    "narrativeqa": english_f1,
    "qasper": english_f1,
    "multifieldqa_en": english_f1,
    "multifieldqa_zh": chinese_f1,
    "hotpotqa": english_f1,
    "2wikimqa": english_f1,
    "musique": english_f1,
    "dureader": chinese_rouge_l,
    "gov_report": rouge_l,
    "qmsum": rouge_l,
    "multi_news": rouge_l,
    "vcsum": chinese_rouge_l,
    "trec": class_found,
    "triviaqa": english_f1,
    "samsum": rouge_l,
    "lsht": class_found,
    "passage_count": number_found,
    "passage_retrieval_en": number_found,
    "passage_retrieval_zh": number_found,
    "lcc": line_similarity,
    "repobench-p": line_similarity,
}
"""By dataset."""

PACKAGES: dict[Metric, tuple[str, ...]] = {
    chinese_f1: ("jieba",),
    rouge_l: ("rouge",),
    chinese_rouge_l: ("rouge", "jieba"),
}
"""What a metric needs beside what is always installed."""

FIRST_LINE = frozenset({"trec", "triviaqa", "samsum", "lsht"})
"""Datasets of examples, which a model goes on to make up: only the first line of its answer counts."""

NO_CHAT = FIRST_LINE | {"lcc", "repobench-p"}
"""Datasets that chat models continue as texts, too."""
