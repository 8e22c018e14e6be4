"""`nsa evaluate`: what a model can do, under its own layers and under sparse methods."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_cli.function_command import run_function
from nsa_lightning.checkpoint.convert import RopeChange
from nsa_lightning.evaluation.figures import draw_all
from nsa_lightning.evaluation.lm_eval_tasks import LmEvalConfig
from nsa_lightning.evaluation.longbench import LongBenchConfig
from nsa_lightning.evaluation.maps import check_layers, text_of_maps
from nsa_lightning.evaluation.method import open_methods
from nsa_lightning.evaluation.methods import MethodSettings
from nsa_lightning.evaluation.needle import NeedleConfig
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.reasoning import ReasoningConfig
from nsa_lightning.evaluation.results import SUMMARY, ResultFile
from nsa_lightning.evaluation.ruler import RulerConfig
from nsa_lightning.evaluation.runner import Evaluation, RunConfig
from nsa_lightning.evaluation.summary import Summary
from nsa_lightning.evaluation.tables import tables
from nsa_lightning.evaluation.tasks import TaskSettings, check_names, open_suites, open_tasks, split_names
from nsa_lightning.generation.device import DtypeName, choose_dtype, use_device
from nsa_lightning.generation.text_model import open_text_model

_PATHS = ("model", "tokenizer", "output_dir", "table", "texts", "documents", "longbench_dir", "problems")


def evaluate_model(
    model: str | None = None,
    tasks: list[str] = [],  # noqa: B006 (not changed)
    lengths: list[int] = [4096],  # noqa: B006
    methods: list[str] = [],  # noqa: B006
    budget: int | None = None,
    method: MethodSettings = MethodSettings(),  # noqa: B008 (frozen)
    needle: NeedleConfig = NeedleConfig(),  # noqa: B008 (frozen)
    ruler: RulerConfig = RulerConfig(),  # noqa: B008 (frozen)
    texts: list[str] = [],  # noqa: B006
    text_samples: int = 4,
    documents: str | None = None,
    longbench_dir: str | None = None,
    longbench: LongBenchConfig = LongBenchConfig(),  # noqa: B008 (frozen)
    problems: str | None = None,
    reasoning: ReasoningConfig = ReasoningConfig(),  # noqa: B008 (frozen)
    lm_eval: LmEvalConfig = LmEvalConfig(),  # noqa: B008 (frozen)
    maps: str | None = None,
    chat: bool = False,
    tokenizer: str | None = None,
    output_dir: str = "runs/evaluate",
    overwrite: bool = False,
    table: list[str] = [],  # noqa: B006
    batch_size: int = 8,
    device: str = "auto",
    dtype: DtypeName = "auto",
    cuda_graphs: bool = True,
    measure: bool = True,
    rope: RopeChange = RopeChange(),  # noqa: B008 (frozen)
) -> int:
    """Measure what a model can do, and what sparse attention methods leave of it.

    Results are kept case by case in output_dir (cases.jsonl): the same command goes on where it was interrupted, and
    results of other settings are never mixed with it. At the end stand a table, summary.json and pictures.

    Args:
        model: as of nsa generate: a checkpoint of nsa fit or its run, a directory of nsa convert or nsa export, or a
            dense Hugging Face directory.
        tasks: needle, which is taken if neither tasks nor maps are given; ruler (variable tracking, common words,
            frequent words); positions (loss by position in texts); questions (on documents); longbench; reasoning; and
            lm_eval:TASK for tasks of lm-evaluation-harness, such as lm_eval:paper_general for those of the paper.
        lengths: tokens of prompt and answer together, for tasks that are made at any length.
        methods: how full attention layers attend, one method after another: own (the model's own layers, if nothing is
            given), exact_top, exact_top_blocks, quest, infllm, h2o or sliding.
        budget: tokens that each query reads under a sparse method; method.budget if not given.
        method: the sparse methods.
        needle: the needle task.
        ruler: the other tasks of RULER.
        texts: of the task positions: a directory of nsa prepare, whose validation documents are read, or text, code and
            jsonl files, directories and globs.
        text_samples: documents of the task positions, each of the longest of lengths.
        documents: of the task questions: a .jsonl file with question, answers and perhaps context in each line.
        longbench_dir: of the task longbench: a directory of its published .jsonl files, or its data.zip.
        longbench: the longbench task.
        problems: of the task reasoning: a .jsonl file with problem and answer in each line.
        reasoning: the reasoning task.
        lm_eval: tasks of lm-evaluation-harness.
        maps: a text file of whose beginning, the longest of lengths, a picture is drawn: which blocks each query of
            every NSA layer selects; `needle` for a made text with a needle in its middle.
        chat: put each question as a user's message into the tokenizer's chat template.
        tokenizer: tokenizer.json or its directory; left out, the one that belongs to the model.
        output_dir: where results are kept.
        overwrite: begin anew instead of going on with the results in output_dir.
        table: summary.json files of finished runs, or their directories, to lay side by side; nothing is measured.
        batch_size: cases that are answered at once, fewer where their caches do not fit the memory.
        device: auto (a GPU if there is one), cpu, cuda or cuda:1.
        dtype: of weights and cache; auto is bfloat16 on a GPU and float32 on a CPU.
        cuda_graphs: replay steps of decoding as CUDA graphs; on a GPU only.
        measure: count the attention mass that a sparse method keeps and the blocks that it recalls, which takes time.
        rope: rotary embedding beyond the context that the model is made for.

    Returns:
        0.

    Raises:
        ValueError: a setting is out of range, a file is missing, or the model cannot be read.
    """
    if table:
        print(tables(_read_summaries(table)))
        return 0
    if model is None:
        raise SettingError("model must be given, or table to lay finished runs side by side, got neither")
    config = RunConfig(batch_size=batch_size, cuda_graphs=cuda_graphs)
    names = split_names(tasks) or ([] if maps is not None else ["needle"])
    check_names(names)
    _check_lengths(lengths)
    place = use_device(device)
    opened = open_text_model(Path(model), Path(tokenizer) if tokenizer is not None else None, rope)
    form = PromptForm(opened.tokenizer, opened.directory if chat else None)
    settings = TaskSettings(
        lengths=lengths,
        max_seq_len=opened.max_seq_len,
        needle=needle,
        ruler=ruler,
        longbench=longbench,
        reasoning=reasoning,
        lm_eval=lm_eval,
        longbench_dir=longbench_dir,
        problems=problems,
        documents=documents,
        texts=texts,
        text_samples=text_samples,
    )
    chosen = open_tasks(names, settings, form)
    suites = open_suites(names, settings, form)
    sparse = method if budget is None else replace(method, budget=budget)
    ways = open_methods(split_names(methods), sparse, opened.config, measure)
    directory = Path(output_dir)
    evaluation = Evaluation(opened, Path(model), chosen, ways, place, choose_dtype(dtype, place), config, suites)
    evaluation.check()
    shown = None
    if maps is not None:
        check_layers(opened.config)
        shown = text_of_maps(None if maps == "needle" else maps, max(lengths), form)
    results = ResultFile(directory, anew=overwrite)
    if opened.trained.remark is not None:
        print(f"nsa evaluate: note: {opened.trained.remark}", file=sys.stderr)
    evaluation.run(results)
    summary = evaluation.summary(results)
    summary.write(directory / SUMMARY)
    pictures = draw_all(summary, directory)
    if shown is not None:
        pictures.append(directory / "selection.png")
        evaluation.draw_maps(shown, pictures[-1])
    print(tables({directory.name: summary}))
    print(f"\nwritten: {', '.join(str(path) for path in (directory / SUMMARY, *pictures))}")
    return 0


def _check_lengths(lengths: Sequence[int]) -> None:
    if not lengths or min(lengths) < 1:
        raise SettingError(f"lengths must be one or more numbers of at least 1, got {list(lengths)}")


def _read_summaries(places: Sequence[str]) -> dict[str, Summary]:
    """Summaries by the names of their runs, which are those of their directories."""
    paths = [Path(place) / SUMMARY if Path(place).is_dir() else Path(place) for place in places]
    names = [path.parent.name if path.name == SUMMARY else path.stem for path in paths]
    twice = {name for name in names if names.count(name) > 1}
    return {str(path) if name in twice else name: Summary.read(path) for name, path in zip(names, paths, strict=True)}


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    return run_function("evaluate", evaluate_model, sys.argv[2:] or ["--help"], paths=_PATHS)
