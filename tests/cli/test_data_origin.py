"""`data.sources`, `data.prepared` and `data.mixture`: the last place that names one holds."""

import json

import pytest
from nsa_cli.data_origin import with_one_origin


@pytest.fixture
def configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = {
        "sources": {"sources": ["a"], "prepared": None},
        "prepared": {"prepared": "sets/a", "sources": []},
        "mixture": {"mixture": {"a": {"prepared": "sets/a"}}},
        "both": {"sources": ["a"], "prepared": "sets/a"},
        "neither": {"seq_len": 9},
        "chosen": {"sources": ["a"], "exclude": ["b"]},
    }
    for name, data in states.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": data}))
    (tmp_path / "other.yaml").write_text("trainer: {max_steps: 3}\n")
    (tmp_path / "broken.yaml").write_text("a: [")


@pytest.mark.parametrize(
    ("words", "cleared"),
    [
        ("--config sources.yaml --data.prepared x", "sources"),
        ("--data.prepared x --config sources.yaml", "sources"),
        ("--config=sources.yaml --data.prepared=x", "sources"),
        ("-c sources.yaml --data.mixture x.yaml --config other.yaml", "sources"),
        ("--config prepared.yaml --data.sources a b", "prepared"),
        ("--config prepared.yaml --data.sources+=a", "prepared"),
        ("--config sources.yaml --config prepared.yaml --config neither.yaml", "sources"),
        ("--config sources.yaml --config mixture.yaml --config prepared.yaml", "sources mixture"),
        ("--config prepared.yaml --config sources.yaml", "prepared"),
        ("--config mixture.yaml --data.prepared x", "mixture"),
        ("--config both.yaml --data.prepared x", "sources"),
        ("--config sources.yaml --data.sources x", ""),
        ("--config sources.yaml --data.prepared null --data.sources", ""),
        ("--config sources.yaml --data.sources [] --data.prepared x", "sources"),
        ("--config sources.yaml", ""),
        ("--config both.yaml", ""),
        ("--data.sources a --data.prepared x", ""),
        ("--config sources.yaml --data.sources a --data.prepared x", ""),
        ("--config broken.yaml --config missing.yaml --data.prepared x", ""),
        ("--config", ""),
        ("", ""),
    ],
)
def test_the_last_place_that_names_an_origin_holds(configs, words, cleared):
    clear = {"sources": "--data.sources=[]", "prepared": "--data.prepared=null", "mixture": "--data.mixture=null"}
    given = ["fit", *words.split()]
    assert with_one_origin(given) == [*given, *(clear[name] for name in cleared.split())]


@pytest.mark.parametrize(
    ("words", "cleared"),
    [
        ("--config chosen.yaml --data.prepared x", "sources exclude"),
        ("--config chosen.yaml --config prepared.yaml --config other.yaml", "sources exclude"),
        ("--config chosen.yaml --data.prepared x --data.exclude b", "sources"),
        ("--config chosen.yaml --data.sources x", ""),
        ("--config chosen.yaml --data.include b", ""),
        ("--data.prepared x --data.exclude b", ""),
    ],
)
def test_patterns_go_with_the_sources_that_they_were_given_for(configs, words, cleared):
    given = ["fit", *words.split()]
    assert with_one_origin(given) == [*given, *(f"--data.{name}=[]" for name in cleared.split())]


def test_a_config_is_found_under_the_path_that_its_variables_give(configs, tmp_path, monkeypatch):
    monkeypatch.setenv("CONFIGS", str(tmp_path))
    monkeypatch.chdir("/")
    words = ["--config", "$CONFIGS/sources.yaml", "--data.prepared", "x"]
    assert with_one_origin(words) == [*words, "--data.sources=[]"]


def test_a_config_may_be_given_as_its_text():
    words = ["--config", "{data: {sources: [a]}}", "--data.prepared", "x"]
    assert with_one_origin(words) == [*words, "--data.sources=[]"]
