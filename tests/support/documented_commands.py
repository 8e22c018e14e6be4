"""The commands that the documentation shows: found in its text, and read by the parsers that users meet."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from nsa_cli.function_command import parse_settings
from nsa_cli.main import main
from nsa_cli.memory import MemoryCommandLine, MemoryTrainer
from nsa_cli.trainer_commands import NSACommandLine, Trainer, run_command_line, with_one_origin

ROOT = Path(__file__).parents[2]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
_STARTS = r"(nsa|srun|torchrun) "
_CONTINUED = re.compile(r"\\\n\s*")
_FLAGGED = re.compile(r"(?<!--attention )\bnsa(?:_cli\.main)? [a-z]+(?: [a-z]+)? --[a-z]")
_OMITTED = "…"
_TRAINER = {"fit", "validate", "test", "predict", "memory"}


class Command(NamedTuple):
    """A line that starts `nsa`."""

    place: str  # file and line
    words: tuple[str, ...]  # after `nsa`


def documents() -> list[Path]:
    """What tells users what to type."""
    texts = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return sorted([*texts, *(ROOT / "configs").rglob("*.yaml")])


def commands(name: str, text: str) -> list[Command]:
    """Every `nsa …` in blocks of code, in spans of code, and in the comments of a config."""
    found = []
    for line, code in _code(name, text):
        variables: dict[str, list[str]] = {}
        for words in map(_split, _CONTINUED.sub(" ", code).splitlines()):
            if len(words) == 1 and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])):
                variables[f"${assignment[1]}"] = assignment[2].split()
            expanded = [part for word in words for part in variables.get(word, [word]) if part != _OMITTED]
            found += [Command(f"{name}:{line}", rest) for rest in _after_nsa(expanded)]
    return found


def count_commands(text: str) -> int:
    """How many commands with settings a text seems to have, wherever they stand in it."""
    return len(_FLAGGED.findall(_CONTINUED.sub(" ", text)))


def make_targets(name: str, text: str) -> set[str]:
    """The targets of every `make …` in code."""
    return {target for _, code in _code(name, text) for target in re.findall(r"\bmake ([a-z][\w-]*)", code)}


class Parsers:
    """The parsers of all commands, each built once; nothing is run, and files that are named need not exist.

    Args:
        config: read in the place of a config that is not there.
        prepared: directory of a prepared set, read in the place of one that is not there.
    """

    def __init__(self, config: Path, prepared: Path) -> None:
        self._stand_ins = {"--config": str(config), "-c": str(config), "--data.prepared": str(prepared)}
        self._trainer_parsers: dict[str, NSACommandLine] = {}

    def parse(self, words: Sequence[str], monkeypatch) -> int:
        """The exit status that the command's parser gives these words, as typed after `nsa`."""
        try:
            if words[0] in _TRAINER:
                self._parse_trainer(words, monkeypatch)
                return 0
            return self._parse_function(words, monkeypatch)
        except SystemExit as stop:
            return stop.code

    def _parse_trainer(self, words: Sequence[str], monkeypatch) -> None:
        monkeypatch.setattr(sys, "argv", ["nsa", *words])
        if words[0] not in self._trainer_parsers:
            self._trainer_parsers[words[0]] = _trainer_parser(words[0])
        self._trainer_parsers[words[0]].parse_args(with_one_origin(self._present(words)))

    def _parse_function(self, words: Sequence[str], monkeypatch) -> int:
        def parse(command, function, words, *, paths=(), verbatim=()):
            settings = parse_settings(command, function, words, verbatim)
            if command == "bench training":
                self._parse_trainer(["fit", *settings["fit"]], monkeypatch)
            return 0

        monkeypatch.setattr(sys, "argv", ["nsa", *words])
        if words[0].isidentifier() and (ROOT / "cli" / "nsa_cli" / f"{words[0]}.py").exists():
            monkeypatch.setattr(import_module(f"nsa_cli.{words[0]}"), "run_function", parse)
        return main()

    def _present(self, words: Sequence[str]) -> list[str]:
        """The words with a stand-in for each file that is not there."""
        flags = [None, *words[:-1]]
        missing = [flag in self._stand_ins and not Path(word).exists() for flag, word in zip(flags, words, strict=True)]
        return [
            self._stand_ins[flag] if absent else word for flag, word, absent in zip(flags, words, missing, strict=True)
        ]


def _trainer_parser(command: str):
    found = []
    command_line, trainer = (MemoryCommandLine, MemoryTrainer) if command == "memory" else (NSACommandLine, Trainer)

    class ParserAlone(command_line):
        def parse_arguments(self, parser, args):
            found.append(parser)
            sys.exit()

    try:
        run_command_line(ParserAlone, trainer)
    except SystemExit:
        return found[0]


def _code(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Pieces of code with the line that each begins in."""
    if name.endswith(".yaml"):
        comments = [line.partition("#")[2].strip() if "#" in line else "" for line in text.splitlines()]
        text = "\n".join(comments)
        yield from ((number, line) for number, line in enumerate(comments, 1) if re.match(_STARTS, line))
    for fence in _FENCE.finditer(text):
        yield _line(text, fence.start()), fence["code"]
    prose = _FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    yield from ((_line(prose, span.start()), span[1].replace("\n", " ")) for span in _SPAN.finditer(prose))


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _split(line: str) -> list[str]:
    """The words of a line as a shell has them, or none if the line names no command of ours and sets no variable."""
    if not re.search(r"\bnsa(_cli\.main)? |^\w+=", line):
        return []
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _after_nsa(words: list[str]) -> Iterator[tuple[str, ...]]:
    """What follows `nsa`, or Python's `-m nsa_cli.main`, in each command of a line; `--attention nsa` is none."""
    ends = [index for index, word in enumerate(words) if set(word) <= set("|&;<>()")]
    for first, last in zip([0, *(end + 1 for end in ends)], [*ends, len(words)], strict=True):
        simple = words[first:last]
        names = [i for i, word in enumerate(simple) if word in ("nsa", "nsa_cli.main")]
        if names and (names[0] == 0 or not simple[names[0] - 1].startswith("--")):
            yield tuple(simple[names[0] + 1 :])
