"""Every command in the documentation is one that its parser takes. `make check` runs this too."""

import re

import pytest
from support.documented_commands import ROOT, Parsers, commands, count_commands, documents, make_targets

from nsa_lightning.data.plan import make_plan
from nsa_lightning.data.prepare import prepare
from nsa_lightning.data.settings import TextSettings

DOCUMENTS = {str(path.relative_to(ROOT)): path.read_text() for path in documents()}
PLACES = {command.words: command.place for name, text in DOCUMENTS.items() for command in commands(name, text)}


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand-ins")
    (folder / "texts").mkdir()
    for index in range(3):
        (folder / "texts" / f"{index}.txt").write_text(f"text {index}")
    prepare(make_plan(TextSettings(sources=str(folder / "texts"))), folder / "set", num_workers=0)
    return Parsers(ROOT / "configs" / "quickstart.yaml", folder / "set")


@pytest.fixture
def parse(parsers, monkeypatch):
    """Exit status of parsing the words that follow `nsa`; from the root of the repository, as the documents have it."""
    monkeypatch.chdir(ROOT)
    return lambda words: parsers.parse(words, monkeypatch)


@pytest.mark.parametrize("words", PLACES, ids=lambda words: f"{PLACES[words]} {' '.join(words)[:40]}")
def test_every_command_is_accepted(parse, capsys, words):
    mentioned = () if any(word.startswith("--") for word in words) else ("--help",)  # its settings were left out
    assert parse((*words, *mentioned)) == 0, f"nsa {' '.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize(
    "line",
    [
        "nsa fit --config configs/quickstart.yaml --data.seqlen 64",
        "nsa fit --config runs/…/config.yaml --trainer.max_step 64    # of a run",
        "nsa validate --ckpt_path last --trainer.precision 31",
        "nsa memory --config configs/nsa_8b.yaml --world_sise 4",
        "srun --nodes 2 nsa fit --config configs/nsa_70b.yaml --ckpt_paths last",
        "torchrun --nnodes 4 \\\n    -m nsa_cli.main fit --config configs/nsa_8b.yaml --trainer.nodes 4",
        "nsa prepare --sources texts --output_dir set --shard_sise 9",
        "nsa generate --model runs/quickstart --promt 'def main():'",
        "nsa convert --source a --output b --nsa.windows_size 9",
        "nsa bench kernels --shapes A --length 65536",
        "nsa bench training --config configs/nsa_1b.yaml --lengths 32768 --device 1",
        "nsa bench training --config configs/nsa_1b.yaml --data.seqlen 9",
        "nsa bench kernel --shapes A",
        "nsa fitt --config configs/quickstart.yaml",
        'same="--config configs/quickstart.yaml --data.seqlen 9"\nnsa fit $same',
    ],
)
def test_a_misspelt_command_is_found_and_refused(parse, line):
    ((_, words),) = commands("example.md", f"Text.\n\n```bash\n{line}\n```\n")
    assert parse(words) == 2


def test_commands_are_found_in_spans_and_in_the_comments_of_configs():
    text = "Say `nsa fit\n--trainer.max_steps 3`, not `--attention nsa full`, nor `srun nsa predict … --data.seed 1`."
    found = [command.words for command in commands("example.md", text)]
    assert found == [("fit", "--trainer.max_steps", "3"), ("predict", "--data.seed", "1")]
    text = "# nsa fit --data.seed 3\n# or `nsa bench study`, says nsa memory.\ndata: {seed: 3}  # `nsa test`\n"
    assert commands("example.yaml", text) == [
        ("example.yaml:1", ("fit", "--data.seed", "3")),
        ("example.yaml:2", ("bench", "study")),
        ("example.yaml:3", ("test",)),
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_command_with_settings_stands_outside_of_code(name):
    found = [command for command in commands(name, DOCUMENTS[name]) if any(word[:2] == "--" for word in command.words)]
    assert len(found) >= count_commands(DOCUMENTS[name])


def test_every_target_of_make_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set().union(*(make_targets(name, text) for name, text in DOCUMENTS.items()))
    assert named >= {"demo", "test", "check"}
    assert named <= targets
