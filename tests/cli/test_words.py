"""What is typed behind a command that is a function."""

from dataclasses import dataclass

import pytest
from nsa_cli.function_command import run_function


@dataclass(frozen=True)
class Nested:
    """Settings of a group."""

    name: str | None = None
    size: int = 3


def parsed(*words):
    """The settings that a command gets."""
    found = {}

    def command(
        path: str = "here",
        prompt: str | None = None,
        stop: list[str] = [],  # noqa: B006 (not changed)
        files: list[str] = [],  # noqa: B006
        lengths: list[int] = [],  # noqa: B006
        chat: bool = False,
        graphs: bool = True,
        top_k: int | None = 5,
        nested: Nested = Nested(),
    ) -> int:
        found.update(locals())
        return 0

    assert run_function("test", command, list(words), verbatim=("stop",)) == 0
    return found


TEXTS = [
    "# a comment",
    "null",
    "~",
    "---",
    "--",
    "",
    " ",
    "[1, 2]",
    "{a: b}",
    "1e3",
    "yes",
    "-1",
    "- item",
    "-x",
    "--word",
]
TEXTS += [
    '"quoted"',
    "a: b",
    "!!python/none",
    "a\nb",
    "%",
    "&a",
    "*a",
    "\x07\x7f",
    "\N{SLIGHTLY SMILING FACE}",
    "a=b",
    "=",
    "\udce9",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_was_typed(text):
    for words in (["--prompt", text], [f"--prompt={text}"], ["--top_k", "2", "--prompt", text, "--chat", "true"]):
        assert parsed(*words)["prompt"] == text
    assert parsed("--path", text)["path"] == text
    assert parsed("--nested.name", text)["nested"] == Nested(text)
    assert parsed(f"--stop={text}")["stop"] == parsed("--stop", text)["stop"] == [text]
    assert parsed(f"--files={text}")["files"] == [text]


def test_other_settings_are_values_still():
    found = parsed("--top_k", "null", "--nested.size", "4", "--nested.name", "null", "--lengths", "[1, 2]")
    assert (found["top_k"], found["nested"], found["lengths"]) == (None, Nested("null", 4), [1, 2])
    assert parsed()["prompt"] is None


def test_a_list_takes_the_words_up_to_the_next_option_and_adds_up():
    found = parsed("--files", "*.c", "a b", "--lengths", "1", "2", "--stop", "[x]", "[INST]", "---", "--files", "[y")
    assert found["files"] == ["*.c", "a b", "[y"]
    assert found["lengths"] == [1, 2]
    assert found["stop"] == ["[x]", "[INST]", "---"]
    assert parsed("--stop=a", "--stop=b", "--stop", "c", "d")["stop"] == ["a", "b", "c", "d"]
    assert parsed("--lengths=1", "--lengths", "2", "3")["lengths"] == [2, 3]
    assert parsed("--files", "a", "--files", "[]", "--files", "b")["files"] == ["b"]
    assert parsed("--stop", "--chat", "--files")["stop"] == []


def test_a_list_of_names_may_be_written_as_in_a_config():
    for words in ('["a/", "b"]', "[a/, b]"):
        assert parsed("--files", words)["files"] == ["a/", "b"]
    assert parsed("--files", "[]")["files"] == []
    assert parsed("--files", "[0-9]*.c")["files"] == ["[0-9]*.c"]
    assert parsed("--stop", '["a"]')["stop"] == ['["a"]']


def test_a_switch_alone_is_on():
    assert parsed("--chat")["chat"]
    assert parsed("--chat", "--prompt", "x")["chat"]
    assert not parsed("--chat", "false")["chat"]
    assert not parsed("--graphs=false", "--chat")["graphs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "--chat"], "--prompt: expected one argument"),
        (["--prompt"], "--prompt: expected one argument"),
        (["--promt", "x"], "--promt"),
        (["--stop", "a", "--lenghts", "3"], "--lenghts"),
        (["--prompt", "a", "b"], "b"),
        (["--top_k", "many"], "top_k"),
    ],
)
def test_a_mistake_among_them_is_named(capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        parsed(*words)
    assert message in capsys.readouterr().err
