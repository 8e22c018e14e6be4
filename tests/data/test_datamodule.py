import inspect
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonargparse import ArgumentParser, set_parsing_settings
from support.tokenizers import word_piece

from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.data.sets import MixtureSet, Packing, configured_vocab_size
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.splits import split_of
from nsa_lightning.data.tokenizer import Tokenizer, TokenizerConfig


@pytest.mark.parametrize("packing", ["sequential", "best_fit"])
def test_a_second_run_reads_the_cache(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path, packing: str
) -> None:
    make_data(packing=packing).prepare_data()
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    data = make_data(packing=packing, seed=4)
    data.setup("fit")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == cached
    assert data.stores[0].manifest.num_documents == 60
    assert len(list((tmp_path / "cache").glob("plan-*"))) == (3 if packing == "best_fit" else 0)


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0.3}, {"tokenizer": TokenizerConfig(vocab_size=310)}, {"exclude": ["1*.txt"]}]
)
def test_other_settings_make_another_store(
    make_data: Callable[..., PackedTextDataModule], change: dict[str, Any]
) -> None:
    data, other = make_data(), make_data(**change)
    data.setup("fit")
    other.setup("fit")
    assert data.stores[0].path != other.stores[0].path
    assert data.stores[0].manifest != other.stores[0].manifest


def test_changed_text_makes_another_store(make_data: Callable[..., PackedTextDataModule], corpus: Path) -> None:
    data, other = make_data(), make_data()
    data.setup("fit")
    (corpus / "00.txt").write_text("something else")
    other.setup("fit")
    assert data.stores[0].fingerprint != other.stores[0].fingerprint


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
    assert data.stores[0].manifest.tokenizer == tokenizer.fingerprint


def test_the_unigram_baseline_is_the_smoothed_cross_entropy(make_data: Callable[..., PackedTextDataModule]) -> None:
    data = make_data()
    data.setup("validate")

    def followers(split: str) -> list[int]:
        tokens = data.stores[0].split(split)
        return tokens.read(tokens.offsets[:-1] + 1, np.diff(tokens.offsets) - 1).tolist()

    train, val = followers("train"), followers("val")
    frequency = [(train.count(token) + 1) / (len(train) + data.vocab_size) for token in range(data.vocab_size)]
    expected = -sum(np.log2(frequency[token]) for token in val) / data.stores[0].manifest.splits["val"].bytes
    assert data.unigram_bits_per_byte == pytest.approx(expected)
    assert 1 < expected < 8


@pytest.fixture
def word_pieces(tmp_path: Path) -> TokenizerConfig:
    path = tmp_path / "word_pieces.json"
    path.write_text(word_piece().to_str())
    return TokenizerConfig(path=str(path), end_of_text="[SEP]")


@pytest.mark.parametrize("packing", ["best_fit", "sequential"])
def test_every_byte_of_a_text_is_counted_for_a_tokenizer_that_drops_some(
    make_data: Callable[..., PackedTextDataModule], corpus: Path, word_pieces: TokenizerConfig, packing: Packing
) -> None:
    data = make_data(tokenizer=word_pieces, packing=packing, seq_len=4096)
    texts = [path.read_text() for path in corpus.iterdir()]
    for stage, split in ("validate", "val"), ("test", "test"):
        data.setup(stage)
        (batch,) = data.val_dataloader() if split == "val" else data.test_dataloader()
        sizes = [len(text.encode()) for text in texts if split_of(text, 0.2, 0.1) == split]
        assert sorted(size for size in batch.target_bytes.tolist() if size) == sorted(sizes)
    assert data.tokenizer.byte_lengths[batch.targets.clamp(min=0)].sum() != batch.target_bytes.sum()


def test_the_bytes_of_a_document_that_is_cut_are_those_of_its_scored_tokens(
    make_data: Callable[..., PackedTextDataModule], word_pieces: TokenizerConfig
) -> None:
    data = make_data(tokenizer=word_pieces, seq_len=16)
    data.setup("validate")
    split = data.stores[0].split("val")
    counts = split.read_byte_counts(split.offsets[:1], split.offsets[-1:])
    assert counts.sum() == data.stores[0].manifest.splits["val"].bytes
    place, left_out = 0, 0
    for batch in data.val_dataloader():
        for start, stop, size in zip(
            batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), batch.target_bytes.tolist(), strict=True
        ):
            if place < len(counts):  # else padding
                assert size == counts[place + 1 : place + stop - start].sum()
                left_out += counts[place]
            place += stop - start
    assert left_out > 0


def test_the_unigram_baseline_counts_the_bytes_of_the_text(
    make_data: Callable[..., PackedTextDataModule], word_pieces: TokenizerConfig, tmp_path: Path
) -> None:
    data = make_data(tokenizer=word_pieces)
    data.setup("validate")
    train, val = (data.stores[0].token_counts(split) + (split == "train") for split in ("train", "val"))
    bits = -val @ np.log2(train / train.sum())
    assert data.unigram_bits_per_byte == pytest.approx(bits / data.stores[0].manifest.splits["val"].bytes)


def test_a_set_of_the_format_before_is_read_and_its_estimate_of_bytes_told(
    make_data: Callable[..., PackedTextDataModule], tokenizer: Tokenizer, word_pieces: TokenizerConfig, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "bytes.json")
    for config, is_estimate in (word_pieces, True), (TokenizerConfig(path=str(tmp_path / "bytes.json")), False):
        new = make_data(tokenizer=config)
        new.setup("fit")
        path = Path(new.stores[0].path)
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["first_bytes"]
        names = [name for name in manifest["checksums"] if name.endswith(".bytes")]
        assert bool(names) == is_estimate
        for name in names:
            del manifest["checksums"][name]
            (path / name).unlink()
        (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 2}))
        old = make_data(sources=[], prepared=str(path))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            old.setup("fit")
        assert any("bits per byte are an estimate" in str(warning.message) for warning in caught) == is_estimate
        assert old.stores[0].fingerprint == new.stores[0].fingerprint
        (batch,) = list(old.val_dataloader())[:1]
        scored = batch.targets[batch.targets >= 0]
        assert batch.target_bytes.sum() == old.tokenizer.byte_lengths[scored].sum()


def test_the_unigram_baseline_of_a_mixture_counts_each_set_by_its_weight(
    make_data: Callable[..., PackedTextDataModule], corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    config = TokenizerConfig(path=str(tmp_path))
    data = [make_data(sources=[str(corpus / glob)], tokenizer=config) for glob in ("[0-3]*.txt", "[45]*.txt")]
    for each in data:
        each.setup("fit")
    weights = {"a": 3.0, "b": 0.5}
    sets = zip(weights.items(), data, strict=True)
    mixture = {name: MixtureSet(prepared=str(each.stores[0].path), weight=weight) for (name, weight), each in sets}
    mixed = make_data(sources=[], mixture=mixture)
    mixed.setup("fit")
    counts = [each.stores[0].token_counts("train") for each in data]
    frequency = sum(weight / 3.5 * each / each.sum() for weight, each in zip(weights.values(), counts, strict=True))
    total = sum(each.sum() for each in counts)
    val = sum(each.stores[0].token_counts("val") for each in data)
    bits = -val @ np.log2((frequency * total + 1) / (total + tokenizer.vocab_size))
    size = sum(each.stores[0].manifest.splits["val"].bytes for each in data)
    assert mixed.unigram_bits_per_byte == pytest.approx(bits / size)


def test_binary_files_are_named_or_skipped_on_request(
    make_data: Callable[..., PackedTextDataModule], corpus: Path
) -> None:
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"picture.png is not UTF-8 text: .* data.exclude or data.skip_binary"):
        make_data().setup("fit")
    data = make_data(skip_binary=True)
    data.setup("fit")
    assert (data.stores[0].manifest.num_documents, data.stores[0].manifest.empty_documents) == (60, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sources": []},
            "data.sources must name files, directories, globs or URLs, got none; or set data.prepared or",
        ),
        (
            {"prepared": "set"},
            "exactly one of data.sources, data.prepared, data.mixture must be set, got data.sources and",
        ),
        (
            {"sources": [], "prepared": "set", "exclude": "*.c"},
            "data.exclude must be empty with data.prepared, whose files nsa prepare has chosen, got ['*.c']",
        ),
        (
            {"sources": [], "mixture": {"a": MixtureSet(prepared="x", weight=0)}},
            "data.mixture.a.weight must be a number",
        ),
        ({"curriculum": {5: 64}}, "data.curriculum must begin with step 0, got 5"),
        (
            {"curriculum": {0: 64, 9: 32}},
            "data.curriculum must have ascending lengths from 2 to data.seq_len=128, got [64",
        ),
        (
            {"curriculum": {0: 64, 9: 256}},
            "data.curriculum must have ascending lengths from 2 to data.seq_len=128, got [",
        ),
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
    with pytest.raises(
        ValueError, match=r"data.val_fraction=1e-06, which leaves no validation document among 60; raise"
    ):
        make_data(**few).setup("fit")
    with pytest.raises(ValueError, match=r"data.test_fraction=0.0, which leaves no test document among 60; raise it"):
        make_data(**few).setup("test")
    with pytest.raises(
        ValueError, match=r"data.val_fraction=0.999999 and .*, which leave no training document among 60; lower"
    ):
        make_data(val_fraction=0.999999, test_fraction=0.0).setup("fit")


def test_a_cache_that_cannot_be_made_is_named(make_data: Callable[..., PackedTextDataModule], corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data.cache_dir='.*00.txt/cache' cannot be made: Not a directory"):
        make_data(cache_dir=str(corpus / "00.txt" / "cache")).setup("fit")


def test_a_checkpoint_of_another_tokenizer_is_refused(make_data: Callable[..., PackedTextDataModule]) -> None:
    data, other = make_data(), make_data(tokenizer=TokenizerConfig(vocab_size=310))
    data.setup("validate")
    other.setup("validate")
    message = f"trained with tokenizer {data.tokenizer.fingerprint} (vocabulary 300), the data has "
    with pytest.raises(ValueError, match=re.escape(message)):
        other.load_state_dict(data.state_dict())


def test_a_broken_tokenizer_in_the_cache_is_named(
    make_data: Callable[..., PackedTextDataModule], tmp_path: Path
) -> None:
    make_data().prepare_data()
    (path,) = (tmp_path / "cache").glob("set-*/tokenizer.json")
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path}.*: not a tokenizer.json"):
        make_data().setup("fit")


@pytest.fixture
def prepared(make_data: Callable[..., PackedTextDataModule], tokenizer: Tokenizer, tmp_path: Path) -> str:
    """A set prepared with `tokenizer`, which lies beside it."""
    tokenizer.save(tmp_path / "tokenizer.json")
    data = make_data(tokenizer=TokenizerConfig(path=str(tmp_path)))
    data.setup("fit")
    return str(data.stores[0].path)


def test_a_prepared_set_brings_its_tokenizer_and_splits(
    make_data: Callable[..., PackedTextDataModule], prepared: str, tokenizer: Tokenizer
) -> None:
    data = make_data(sources=[], prepared=prepared, val_fraction=0.0)
    data.setup("fit")
    assert data.tokenizer.fingerprint == tokenizer.fingerprint
    assert len(data.val_dataloader()) > 0
    assert configured_vocab_size(None, 4096, prepared, None) == tokenizer.vocab_size
    assert configured_vocab_size(None, 4096, None, {"a": {"prepared": prepared}}) == tokenizer.vocab_size


def test_another_tokenizer_than_that_of_a_prepared_set_is_refused(
    make_data: Callable[..., PackedTextDataModule], prepared: str, tmp_path: Path
) -> None:
    other = make_data()
    other.setup("fit")
    other.tokenizer.save(tmp_path / "other.json")
    asked = TokenizerConfig(path=str(tmp_path / "other.json"))
    with pytest.raises(
        ValueError, match=r"wrong tokenizer: data.tokenizer.path='.*other.json' is .*, data.prepared was"
    ):
        make_data(sources=[], prepared=prepared, tokenizer=asked).setup("fit")
    make_data(sources=[], prepared=prepared, tokenizer=TokenizerConfig(path=str(tmp_path))).setup("fit")
    sets = {"a": MixtureSet(prepared=prepared), "b": MixtureSet(prepared=str(other.stores[0].path))}
    with pytest.raises(
        ValueError, match=r"must have one tokenizer: data.mixture.a.prepared has .*, data.mixture.b.prep"
    ):
        make_data(sources=[], mixture=sets).setup("fit")


def test_a_damaged_set_is_found_before_the_start(make_data: Callable[..., PackedTextDataModule], prepared: str) -> None:
    path = next(Path(prepared).rglob("train.bin"))
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\1\1")
    make_data(sources=[], prepared=prepared).setup("fit")
    with pytest.raises(ValueError, match=rf"{path} must have checksum"):
        make_data(sources=[], prepared=prepared, verify_checksums=True).setup("fit")
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=rf"{path} must have {len(content)} bytes, it has {len(content) - 2}"):
        make_data(sources=[], prepared=prepared).setup("fit")


def test_the_settings_are_documented_and_parsed_by_the_command_line() -> None:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # as the commands do
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(PackedTextDataModule, "data")
    text = parser.format_help()
    own = inspect.signature(PackedTextDataModule).parameters.keys() - {"text"}
    for name in [*own, *(field.name for field in fields(TextSettings))]:
        assert re.search(rf"--data\.{name} \S+(, --\S+ \S+)?\s+\w\S* [^-(]", text), name
    parsed = parser.parse_args(["--data.sources=[a, b]", "--data.tokenizer.vocab_size=1024", "--data.exclude=x"])
    data = parser.instantiate(parsed).data
    assert (data.text.sources, data.text.exclude) == (["a", "b"], ["x"])
    assert data.text.tokenizer == TokenizerConfig(vocab_size=1024)
    words = ["--data.mixture={a: {prepared: x}, b: {prepared: y, weight: 2}}", "--data.curriculum={0: 64, 9: 8192}"]
    data = parser.instantiate(parser.parse_args([*words, "--data.packing=best_fit"])).data
    assert data.mixture == {"a": MixtureSet(prepared="x"), "b": MixtureSet(prepared="y", weight=2.0)}
    assert (data.curriculum, data.packing) == ({0: 64, 9: 8192}, "best_fit")


@pytest.mark.slow
def test_importing_the_data_module_loads_no_library_before_it_is_needed() -> None:
    script = (
        "import sys; import lightning; before = set(sys.modules); import nsa_lightning.data.datamodule; "
        "print({'tokenizers', 'pyarrow', 'tqdm'} & (set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert printed.strip() == "set()"
