import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from nsa_kernels.errors import SettingError
from support.tokenizers import word_piece
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from nsa_lightning.data import tokenizer as module
from nsa_lightning.data.tokenizer import (
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
    training_sample,
    vocab_size_of,
)

HARD_TEXTS = [
    "🙂👩‍👩‍👧‍👦",
    "文字化け",
    "naïve\u0301",
    "\r\n\t \x00\x7f",
    "\ufeff\u200b\uffff",
    "<|endoftext|>",
    "a" * 1000,
    " ",
]


def sentencepiece_bpe(**vocab: int) -> tokenizers.Tokenizer:
    """A BPE as Llama 2 has it: ▁ for a space, <0xNN> for bytes without a token, BOS before and EOS after."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a", "▁▁"]
    library = tokenizers.Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [("▁", "a"), ("▁", "▁")], byte_fallback=True)
    )
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens(["wörd"])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return library


@given(st.text(max_size=200))
def test_byte_level_tokens_add_up_to_the_bytes_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = tokenizer.encode_batch([text])
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_byte_level_tokens_add_up_to_the_bytes_of_hard_text(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = tokenizer.encode_batch([text])
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.decode(tokens) == text


def test_a_token_of_half_a_character_counts_its_own_bytes(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenizer.encode_batch(["\U0001f9ff"])  # training saw only the first two of its four bytes together
    assert tokenizer.byte_lengths[tokens].tolist() == [0, 2, 1, 1, 0]
    assert tokenizer.decode(tokens[1:3]) == "\ufffd"


def test_sentencepiece_tokens_count_spaces_bytes_and_added_words() -> None:
    tokenizer = Tokenizer(sentencepiece_bpe().to_str())
    text = "a  aé wörd\U0001f9ff"
    (tokens,) = tokenizer.encode_batch([text])
    assert tokenizer.byte_lengths[tokens].sum() == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer.byte_lengths[:3].tolist() == [0, 0, 0]


def unigram() -> tokenizers.Tokenizer:
    """Unites characters of one meaning and doubled spaces, and begins with a space of its own, as T5's does."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("fi", -3.0), *((c, -5.0) for c in "abcdefg12")]
    library = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    library.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Lowercase()]
    )
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.add_special_tokens(["<unk>", "</s>"])
    library.add_tokens([tokenizers.AddedToken("wörd", lstrip=True, rstrip=True)])
    return library


def llama() -> tokenizers.Tokenizer:
    """Puts a space before the text."""
    library = sentencepiece_bpe()
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return library


def byte_level(tokenizer: Tokenizer, **changes: object) -> tokenizers.Tokenizer:
    """The trained tokenizer, changed."""
    library = tokenizers.Tokenizer.from_str(tokenizer._state)
    for name, value in changes.items():
        setattr(library, name, value)
    return library


KINDS = {
    "word pieces": lambda _: word_piece(),
    "unigram": lambda _: unigram(),
    "llama": lambda _: llama(),
    "sentencepiece": lambda _: sentencepiece_bpe(),
    "normalised bytes": lambda trained: byte_level(trained, normalizer=normalizers.NFC()),
    "prefix space": lambda trained: byte_level(trained, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no spaces": lambda trained: byte_level(
        trained, pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    ),
    "bytes": byte_level,
}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.text(max_size=60), st.text("aAﬁé \n\tw\u0301wörd①<s>", max_size=60)))
def test_the_bytes_counted_for_each_token_add_up_to_those_of_any_text(
    tokenizer: Tokenizer, kind: str, text: str
) -> None:
    counting = Tokenizer(KINDS[kind](tokenizer).to_str(), "[SEP]" if kind == "word pieces" else None)
    texts = [text, "", f"{text} {text}"]
    for each, plain, (tokens, counts) in zip(
        texts, counting.encode_batch(texts), counting.encode_counted(texts), strict=True
    ):
        assert tokens.tolist() == plain.tolist()
        assert len(counts) == len(tokens)
        assert counts.min() >= 0
        assert counts.sum() == len(each.encode())
        if counting.is_byte_level:
            assert counting.byte_lengths[tokens].sum() == len(each.encode())


def test_bytes_are_counted_token_by_token(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Tokenizer(word_piece().to_str(), "[SEP]")
    ((tokens, counts),) = counting.encode_counted(["  Éa b\tété  Wörter!\n"])
    names = [counting.decode([token], skip_special_tokens=False) for token in tokens]
    assert list(zip(names, counts.tolist(), strict=True)) == [
        ("[CLS]", 0),
        ("e", 4),  # two spaces and two bytes
        ("##a", 1),
        ("b", 2),
        ("[UNK]", 6),
        ("[UNK]", 9),
        ("!", 1),
        ("[SEP]", 1),
    ]
    monkeypatch.setattr(module, "CHUNK", 5)
    monkeypatch.setattr(module, "GROUP", 9)
    ((_, counts),) = counting.encode_counted(["  Éa b\tété  Wörter!\n"])
    assert counts.sum() == 24


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("bytes", True), ("normalised bytes", False), ("prefix space", False), ("no spaces", False), ("llama", False)],
)
def test_a_byte_level_tokenizer_is_told_from_its_file(tokenizer: Tokenizer, kind: str, expected: bool) -> None:
    assert Tokenizer(KINDS[kind](tokenizer).to_str()).is_byte_level == expected
    splits = pre_tokenizers.Split(tokenizers.Regex(r"\s+|\S+"), "isolated"), pre_tokenizers.Digits(True)
    steps = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    assert Tokenizer(byte_level(tokenizer, pre_tokenizer=steps).to_str()).is_byte_level
    state = json.loads(tokenizer._state)
    del state["model"]["type"]
    assert Tokenizer(json.dumps(state)).is_byte_level
    del state["model"]["vocab"]["z"]
    assert not Tokenizer(json.dumps(state)).is_byte_level


def test_a_trained_tokenizer_puts_end_of_text_at_both_ends(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode_batch(["def", ""])
    assert first[0] == first[-1] == tokenizer.end_of_text_id
    assert tokenizer.end_of_text_id not in first[1:-1]
    assert second.tolist() == [tokenizer.end_of_text_id] * 2


def test_a_documents_start_is_the_tokenizers_own_and_its_end_comes_once() -> None:
    tokenizer = Tokenizer(sentencepiece_bpe().to_str())
    (tokens,) = tokenizer.encode_batch(["a"])
    assert [tokenizer.decode([token], skip_special_tokens=False) for token in tokens] == ["<s>", "a", "</s>"]


def test_text_that_spells_a_special_token_is_text(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenizer.encode_batch(["x<|endoftext|>y"])
    assert (tokens == tokenizer.end_of_text_id).sum() == 2
    assert tokenizer.decode(tokens) == "x<|endoftext|>y"


def test_truncation_and_padding_of_the_file_are_ignored() -> None:
    library = sentencepiece_bpe()
    library.enable_truncation(4)
    library.enable_padding(length=16)
    lengths = [len(tokens) for tokens in Tokenizer(library.to_str()).encode_batch(["a" * 10, "a"])]
    assert lengths == [12, 3]


def test_a_long_text_is_encoded_in_chunks_without_loss(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(random.Random(0).choices(["def f(self):\n", "    return été\n", "文字" * 30], k=300))
    monkeypatch.setattr(module, "CHUNK", 100)
    monkeypatch.setattr(module, "GROUP", 1000)
    first, second, third = tokenizer.encode_batch(["short", text, ""])
    assert tokenizer.decode(first) == "short"
    assert tokenizer.decode(second) == text
    assert tokenizer.byte_lengths[second].sum() == len(text.encode())
    assert (second == tokenizer.end_of_text_id).sum() == len(third) == 2


@pytest.mark.slow
def test_training_depends_on_the_texts_alone() -> None:
    texts = [
        f"{word} number {i % 7} " * 5 for i, word in enumerate(["alpha", "beta", "gamma", "delta", "one", "two"] * 20)
    ]
    script = (
        "import sys, json; from nsa_lightning.data.tokenizer import train_tokenizer; "
        "print(train_tokenizer(json.load(sys.stdin), 280).fingerprint)"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(texts[::-1]), capture_output=True, check=True, text=True
    )
    assert other.stdout.strip() == train_tokenizer(texts, 280).fingerprint
    assert train_tokenizer(texts, 270).fingerprint != train_tokenizer(texts, 280).fingerprint


@pytest.mark.parametrize("word", ["ACGT", "\u6587\u5b57\u5316", " ", "a", "x\u0301", "{};"])
def test_training_sees_no_long_word_of_which_its_time_would_be_the_square(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    library, fed = tokenizers.Tokenizer, list[str]()

    class Recording:
        """The library's tokenizer, and what it is trained on."""

        from_str = library.from_str

        def __init__(self, model: models.Model) -> None:
            vars(self)["library"] = library(model)

        def __getattr__(self, name: str) -> object:
            return getattr(vars(self)["library"], name)

        def __setattr__(self, name: str, value: object) -> None:
            setattr(vars(self)["library"], name, value)

        def train_from_iterator(self, texts: Iterable[str], trainer: trainers.Trainer) -> None:
            fed.extend(texts)
            vars(self)["library"].train_from_iterator(fed, trainer)

    monkeypatch.setattr(tokenizers, "Tokenizer", Recording)
    text = "".join(random.Random(0).choices(word, k=100_000))
    train_tokenizer([text], 300)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert max(end - start for piece in fed for _, (start, end) in split(piece)) <= 256
    assert len("".join(fed)) > 0.99 * len(text)


def test_long_words_are_cut_in_training_alone() -> None:
    texts = ["a word of" + "=" * 127 + "x" * 127 + " text" * 9] * 3
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    trained = train_tokenizer(texts, 290)
    assert json.loads(trained._state)["model"] == json.loads(library.to_str())["model"]
    tokens = trained.encode_batch(["=" * 5000])[0]
    assert trained.decode(tokens) == "=" * 5000
    assert len(tokens) < 100


@pytest.mark.parametrize("action", ["train", "encode"])
def test_ctrl_c_is_answered_while_the_library_works(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    class Interrupting(threading.Thread):
        """Ctrl-C comes as the library begins."""

        def run(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            super().run()

    text = "".join(random.Random(0).choices("ACGT", k=1_000_000))
    before = set(threading.enumerate())
    monkeypatch.setattr(module, "Thread", Interrupting)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer([text], 2000) if action == "train" else tokenizer.encode_batch([text] * 4)
    assert len(set(threading.enumerate()) - before) == 1  # it works on, for seconds


def test_training_fills_at_most_the_vocabulary_asked_for() -> None:
    assert train_tokenizer(["a few words " * 9, "of text"], 270).vocab_size == 270
    assert train_tokenizer(["ab"], 4096).vocab_size == 258


def test_the_sample_is_bounded_and_the_first_in_hash_order() -> None:
    texts = [f"{i} " * 40 for i in range(300)]
    sample = training_sample(texts, 2000)
    assert sample == training_sample(reversed(texts), 2000)
    assert sample == training_sample(texts, 50_000)[: len(sample)]
    assert 2000 <= sum(map(len, sample)) < 2000 + max(map(len, texts))
    assert sorted(training_sample(texts, 10**6)) == sorted(texts)
    assert sum(map(len, training_sample(["x" * 10_000, "y" * 10_000], 2000))) == 2000


@pytest.mark.parametrize("name", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>"])
def test_the_end_of_text_is_found_by_its_usual_names(name: str) -> None:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel()
    library.add_special_tokens(["<pad>", name])
    assert Tokenizer(library.to_str()).end_of_text == name


def test_the_end_of_text_can_be_chosen_and_must_be_known() -> None:
    state = sentencepiece_bpe().to_str()
    assert Tokenizer(state, "<unk>").end_of_text_id == 0
    assert Tokenizer(state, "<unk>").fingerprint != Tokenizer(state).fingerprint
    with pytest.raises(ValueError, match=r"data.tokenizer.end_of_text must name one of the tokenizer's tokens, it has"):
        Tokenizer(state, "<|endoftext|>")
    with pytest.raises(ValueError, match=re.escape("it has none of ('<|endoftext|>', '<|end_of_text|>', '</s>'")):
        Tokenizer(tokenizers.Tokenizer(models.BPE()).to_str())


def test_a_saved_tokenizer_is_the_same_from_its_file_and_its_directory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    for path in tmp_path, tmp_path / "tokenizer.json":
        again = load_tokenizer(str(path))
        assert again.fingerprint == tokenizer.fingerprint
        assert np.array_equal(again.encode_batch(["def été"])[0], tokenizer.encode_batch(["def été"])[0])


def test_the_vocabulary_size_counts_to_the_largest_id(tokenizer: Tokenizer, tmp_path: Path) -> None:
    library = sentencepiece_bpe()
    state = json.loads(library.to_str())
    state["added_tokens"][-1]["id"] = 999
    bare = json.loads(library.to_str())
    del bare["added_tokens"]
    renumbered = json.loads(library.to_str())  # the library gives an added token no id but the next one
    renumbered["added_tokens"][-1] |= {"id": 7, "content": "other"}
    gap = json.loads(library.to_str())
    gap["model"]["vocab"] |= {"▁▁": 2000}
    for content, size in (
        (json.loads(tokenizer._state), 320),
        (json.loads(library.to_str()), 265),
        (state, 1000),
        (bare, 264),
        (renumbered, 265),
        (gap, 2001),
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        assert vocab_size_of(str(tmp_path)) == size
        opened = load_tokenizer(str(tmp_path))
        assert opened.vocab_size == len(opened.byte_lengths) == size
        assert max(opened._vocab.values()) < size


def test_tokens_that_share_an_id_are_refused() -> None:
    state = json.loads(sentencepiece_bpe().to_str())
    state["model"]["vocab"]["▁▁"] = 264  # the number of its tokens, which the first added token is given
    with pytest.raises(
        SettingError, match=r"each token must have an id of its own, '(▁▁|wörd)' and '(▁▁|wörd)' have 264"
    ):
        Tokenizer(json.dumps(state))


def test_the_vocabulary_size_is_read_without_heavy_libraries(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    script = (
        "import sys; from nsa_lightning.data.tokenizer import vocab_size_of; "
        f"print(vocab_size_of({str(tmp_path)!r}), {{'torch', 'tokenizers', 'pyarrow', 'tqdm'}} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert printed.strip() == "320 set()"


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    for read in load_tokenizer, vocab_size_of:
        with pytest.raises(ValueError, match=r"data.tokenizer.path='.*' must be a tokenizer.json or its directory: "):
            read(str(tmp_path))
        for content in "{}", "no json", '{"model": {"vocab": 3}}':
            (tmp_path / "other.json").write_text(content)
            with pytest.raises(ValueError, match=r"data.tokenizer.path='.*other.json': not a tokenizer.json"):
                read(str(tmp_path / "other.json"))


def test_the_config_refuses_what_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer.vocab_size must be at least 257, got 256"):
        TokenizerConfig(vocab_size=256)
    with pytest.raises(ValueError, match=r"data.tokenizer.end_of_text='</s>' needs data.tokenizer.path"):
        TokenizerConfig(end_of_text="</s>")
    assert TokenizerConfig(path="x", end_of_text="</s>").end_of_text == "</s>"
