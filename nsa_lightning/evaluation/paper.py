"""The figures of the paper (arXiv:2502.11089, tables 1 to 3), to stand beside one's own."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class PaperTable(NamedTuple):
    """One table: its columns by the names of our tasks, and what the paper's models reached."""

    title: str
    columns: Mapping[str, str]  # heading by task
    figures: Mapping[str, Sequence[float]]  # by method, in the order of the columns, the mean of them last

    @property
    def tasks(self) -> list[str]:
        """Names of its tasks."""
        return list(self.columns)


LONGBENCH = PaperTable(
    "LongBench",
    {
        "longbench_multifieldqa_en": "MFQA-en",
        "longbench_multifieldqa_zh": "MFQA-zh",
        "longbench_qasper": "Qasper",
        "longbench_hotpotqa": "HPQ",
        "longbench_2wikimqa": "2Wiki",
        "longbench_gov_report": "GovRpt",
        "longbench_dureader": "Dur",
        "longbench_passage_retrieval_en": "PassR-en",
        "longbench_passage_retrieval_zh": "PassR-zh",
        "longbench_lcc": "LCC",
    },
    {
        "H2O": (0.428, 0.429, 0.308, 0.112, 0.101, 0.231, 0.208, 0.704, 0.421, 0.092, 0.303),
        "InfLLM": (0.474, 0.517, 0.356, 0.306, 0.250, 0.277, 0.257, 0.766, 0.486, 0.143, 0.383),
        "Quest": (0.495, 0.561, 0.365, 0.295, 0.245, 0.293, 0.257, 0.792, 0.478, 0.135, 0.392),
        "Exact-Top": (0.502, 0.605, 0.397, 0.321, 0.288, 0.316, 0.291, 0.810, 0.548, 0.156, 0.423),
        "full": (0.512, 0.623, 0.409, 0.350, 0.305, 0.324, 0.294, 0.830, 0.560, 0.163, 0.437),
        "NSA": (0.503, 0.624, 0.432, 0.437, 0.356, 0.307, 0.341, 0.905, 0.550, 0.232, 0.469),
    },
)

GENERAL = PaperTable(
    "General tasks",
    {
        "lm_eval_mmlu": "MMLU",
        "lm_eval_mmlu_pro": "MMLU-Pro",
        "lm_eval_cmmlu": "CMMLU",
        "lm_eval_bbh": "BBH",
        "lm_eval_gsm8k": "GSM8K",
        "lm_eval_minerva_math": "MATH",
        "lm_eval_drop": "DROP",
        "lm_eval_mbpp": "MBPP",
        "lm_eval_humaneval": "HumanEval",
    },
    {
        "full": (0.567, 0.279, 0.576, 0.497, 0.486, 0.263, 0.503, 0.482, 0.335, 0.443),
        "NSA": (0.565, 0.286, 0.587, 0.521, 0.520, 0.264, 0.545, 0.466, 0.348, 0.456),
    },
)

REASONING = PaperTable(
    "Reasoning, AIME 24 by new tokens at most",
    {"reasoning_8192": "8192", "reasoning_16384": "16384"},
    {"full": (0.046, 0.092), "NSA": (0.121, 0.146)},
)

NEEDLE = "paper: NSA finds the needle at all depths and lengths up to 64K"
