"""The end of a text is found by what the files beside a tokenizer name, by every command in the same way."""

import json

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from nsa_lightning.data.token_names import end_of_text_ids, special_token_names
from nsa_lightning.data.tokenizer import Tokenizer, load_tokenizer
from nsa_lightning.generation.text_model import _read_tokenizer

UNUSUAL = "<[end▁of▁sentence]>"


@pytest.fixture
def place(tmp_path):
    """A tokenizer that knows an unusual end of text beside a usual one."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.add_special_tokens(["<pad>", "<|endoftext|>", UNUSUAL])
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


PROPERTIES = {"content": UNUSUAL, "lstrip": False, "special": True, "__type": "AddedToken"}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": UNUSUAL}},
        {"tokenizer_config": {"eos_token": PROPERTIES}},
        {"special_tokens_map": {"eos_token": UNUSUAL}},
        {"special_tokens_map": {"eos_token": PROPERTIES}, "tokenizer_config": {"eos_token": None}},
        {"special_tokens_map": {"eos_token": UNUSUAL}, "tokenizer_config": {"eos_token": "<|endoftext|>"}},
        {"generation_config": {"eos_token_id": 2}},
        {"generation_config": {"eos_token_id": [2, 1]}},
        {"config": {"eos_token_id": 2}},
        {"config": {"eos_token_id": [2, 1]}, "tokenizer_config": {}},
        {"config": {"eos_token_id": 1}, "generation_config": {"eos_token_id": 2}},
        {"config": {"eos_token_id": 1}, "tokenizer_config": {"eos_token": UNUSUAL}},
    ],
    ids=json.dumps,
)
def test_what_any_file_names_is_the_end_of_text(place, files):
    write(place, **files)
    for path in (place, place / "tokenizer.json"):
        assert load_tokenizer(str(path)).end_of_text == UNUSUAL
        assert _read_tokenizer(path, place).end_of_text == UNUSUAL
    assert load_tokenizer(str(place), "<pad>").end_of_text == "<pad>"


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer_config": {"eos_token": None}, "config": {"eos_token_id": None}},
        {"tokenizer_config": {"eos_token": "<unknown>"}},
        {"config": {"eos_token_id": 99}},
        {"config": {"eos_token_id": True}},
        {
            "special_tokens_map": {"eos_token": UNUSUAL},  # an older file, which transformers does not read then
            "tokenizer_config": {"eos_token": "<|endoftext|>", "added_tokens_decoder": {}},
        },
    ],
    ids=json.dumps,
)
def test_where_none_names_a_token_a_usual_one_is_the_end_of_text(place, files):
    write(place, **files)
    assert load_tokenizer(str(place)).end_of_text == "<|endoftext|>"


def test_a_settings_file_that_is_broken_is_named(place):
    (place / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must be readable JSON"):
        load_tokenizer(str(place))
    (place / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must hold an object, got list"):
        special_token_names(place)


def test_a_saved_tokenizer_keeps_the_end_of_text_that_it_was_given(place, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (UNUSUAL, "<pad>", "<|endoftext|>"):
        load_tokenizer(str(place), name).save(tmp_path / "run" / "tokenizer.json")
        assert load_tokenizer(str(tmp_path / "run")).end_of_text == name


def test_ids_of_the_model_are_all_of_them_in_order(tmp_path):
    write(tmp_path, config={"eos_token_id": [3, 4]}, generation_config={"eos_token_id": [5, 3]})
    assert end_of_text_ids(tmp_path) == [5, 3, 4]


def test_a_tokenizer_alone_has_a_usual_end_of_text(place):
    assert Tokenizer((place / "tokenizer.json").read_text()).end_of_text == "<|endoftext|>"
