import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig


def test_a_second_run_reads_the_cache(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_data().prepare_data()
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    monkeypatch.setattr("nsa_lightning.data.datamodule.iter_documents", lambda *_: iter(()))
    data = make_data(seq_len=64)
    data.setup("fit")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == cached
    assert data.store.manifest.num_documents == 60


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0.3}, {"tokenizer": TokenizerConfig(vocab_size=310)}, {"exclude": ["1*.txt"]}]
)
def test_other_settings_make_another_store(
    make_data: Callable[..., PackedTextDataModule], change: dict[str, Any]
) -> None:
    data, other = make_data(), make_data(**change)
    data.setup("fit")
    other.setup("fit")
    assert data.store.path != other.store.path
    assert data.store.manifest != other.store.manifest


def test_changed_text_makes_another_store(make_data: Callable[..., PackedTextDataModule], corpus: Path) -> None:
    data, other = make_data(), make_data()
    data.setup("fit")
    (corpus / "00.txt").write_text("something else")
    other.setup("fit")
    assert data.store.path != other.store.path


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert PackedTextDataModule(sources=["x"]).cache_dir == tmp_path / ".cache" / "nsa-lightning"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert PackedTextDataModule(sources=["x"]).cache_dir == tmp_path / "elsewhere" / "nsa-lightning"
    assert PackedTextDataModule(sources=["x"], cache_dir="~/mine").cache_dir == tmp_path / "mine"


def test_any_tokenizer_file_can_be_used(
    make_data: Callable[..., PackedTextDataModule], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    data = make_data(tokenizer=TokenizerConfig(path=str(tmp_path)))
    data.setup("fit")
    assert data.vocab_size == tokenizer.vocab_size == 320
    assert data.store.manifest.tokenizer == tokenizer.fingerprint
    assert not list((tmp_path / "cache").glob("*.json"))


def test_the_unigram_baseline_is_the_smoothed_cross_entropy(make_data: Callable[..., PackedTextDataModule]) -> None:
    data = make_data()
    data.setup("validate")

    def followers(split: str) -> list[int]:
        offsets, documents = data.store.offsets, data.store.documents(split)
        return [int(token) for i in documents for token in data.store.tokens[offsets[i] + 1 : offsets[i + 1]]]

    train, val = followers("train"), followers("val")
    frequency = [(train.count(token) + 1) / (len(train) + data.vocab_size) for token in range(data.vocab_size)]
    expected = -sum(np.log2(frequency[token]) for token in val) / data.store.manifest.splits["val"].bytes
    assert data.unigram_bits_per_byte == pytest.approx(expected)
    assert 1 < expected < 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "data.sources must name files, directories or globs, got none"),
        ({"seq_len": 1}, "data.seq_len must be at least 2, got 1"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, got -1"),
        ({"seed": -1}, "data.seed must be at least 0, got -1"),
        ({"seq_len": 2**30, "batch_size": 2}, "data.batch_size times data.seq_len must be below 2**31"),
        ({"val_fraction": -0.1}, "must be 0 or more, below 1 in sum, got (-0.1, 0.1)"),
        ({"val_fraction": 0.9}, "must be 0 or more, below 1 in sum, got (0.9, 0.1)"),
    ],
)
def test_a_setting_out_of_range_is_named(
    make_data: Callable[..., PackedTextDataModule], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_data(**settings)


def test_a_split_without_documents_names_the_setting(make_data: Callable[..., PackedTextDataModule]) -> None:
    few = {"val_fraction": 1e-6, "test_fraction": 0.0}
    with pytest.raises(ValueError, match=r"data.val_fraction=1e-06 leaves no validation document among 60; raise it"):
        make_data(**few).setup("fit")
    with pytest.raises(ValueError, match=r"data.test_fraction=0.0 leaves no test document among 60; raise it"):
        make_data(**few).setup("test")
    with pytest.raises(
        ValueError, match=r"data.val_fraction=0.999999 and .* leave no training document among 60; lower"
    ):
        make_data(val_fraction=0.999999, test_fraction=0.0).setup("fit")


def test_a_cache_that_cannot_be_made_is_named(make_data: Callable[..., PackedTextDataModule], corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.cache_dir='.*00.txt/cache' cannot be made: Not a directory"):
        make_data(cache_dir=str(corpus / "00.txt" / "cache")).setup("fit")


def test_a_checkpoint_of_another_tokenizer_is_refused(make_data: Callable[..., PackedTextDataModule]) -> None:
    data, other = make_data(), make_data(tokenizer=TokenizerConfig(vocab_size=310))
    data.setup("validate")
    other.setup("validate")
    message = f"trained with tokenizer {data.tokenizer.fingerprint} (vocabulary 300), data.tokenizer gives "
    with pytest.raises(ValueError, match=re.escape(message)):
        other.load_state_dict(data.state_dict())


def test_a_broken_tokenizer_in_the_cache_is_named(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    make_data().prepare_data()
    (path,) = (tmp_path / "cache").glob("tokenizer-*.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path}.*: not a tokenizer.json: .*; delete it and run again"):
        make_data().setup("fit")


def test_the_settings_are_documented_and_parsed_by_the_command_line() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PackedTextDataModule, "data")
    text = parser.format_help()
    for name in inspect.signature(PackedTextDataModule).parameters:
        assert re.search(rf"--data\.{name} \S+(, --\S+ \S+)?\s+\w\S* [^-(]", text), name
    parsed = parser.parse_args(["--data.sources=[a, b]", "--data.tokenizer.vocab_size=1024", "--data.exclude=x"])
    data = parser.instantiate(parsed).data
    assert (data.sources, data.exclude) == (["a", "b"], ["x"])
    assert data.tokenizer_config == TokenizerConfig(vocab_size=1024)


def test_importing_the_data_module_loads_no_library_before_it_is_needed() -> None:
    script = (
        "import sys; import lightning; before = set(sys.modules); import nsa_lightning.data.datamodule; "
        "print({'tokenizers', 'pyarrow', 'tqdm'} & (set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert printed.strip() == "set()"
