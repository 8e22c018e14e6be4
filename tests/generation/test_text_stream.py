"""Streamed text is the text, without broken characters and without stop strings."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa_lightning.data.tokenizer import Tokenizer, train_tokenizer
from nsa_lightning.generation.text_stream import TextStream

BROKEN = "\N{REPLACEMENT CHARACTER}"


def sentencepiece():
    """A tokenizer like Llama 2's: ▁ for spaces, bytes for what it has no token for, no space at a text's beginning."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, normalizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    library = Library(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(parts)
    library.add_special_tokens(["</s>"])
    return Tokenizer(library.to_str())


def other(model, decoder, *special):
    """A tokenizer with another decoder."""
    from tokenizers import Tokenizer as Library

    library = Library(model)
    library.decoder = decoder
    library.add_special_tokens(["</s>", *special])
    return Tokenizer(library.to_str())


def decoded_otherwise():
    """Tokenizers whose tokens are written in one way at a text's beginning or end and in another within it."""
    from tokenizers import decoders, models

    words = ["[UNK]", "do", "##ing", "n't", ".", "a", "##b", "?", "'", "m", "##海"]
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("b", -1.0), ("▁▁c", -1.0), ("海", -1.0)]
    suffixed = ["a", "b</w>", "c", "d</w>", "海</w>"]
    bytes_too = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁a": 257, "b": 258, "▁": 259}
    first = decoders.Metaspace(prepend_scheme="first")
    stripped = decoders.Sequence([first, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    plain = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return {
        "wordpiece": other(
            models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"), decoders.WordPiece()
        ),
        "metaspace": other(models.Unigram(pieces, 0), decoders.Metaspace()),
        "suffix": other(models.BPE({piece: index for index, piece in enumerate(suffixed)}, []), decoders.BPEDecoder()),
        "two spaces fewer": other(models.BPE(bytes_too, [], byte_fallback=True), stripped),
        "bytes and pieces": other(models.BPE(bytes_too, [], byte_fallback=True), plain, "<|im_end|>"),
    }


TOKENIZERS = {"bytes": train_tokenizer(["a few words, bees and 海 é"], 280), "sentencepiece": sentencepiece()}
ALL = TOKENIZERS | decoded_otherwise()
TEXT = st.text(alphabet="ab é海🙂\n", max_size=20)


def pieces(tokenizer, prompt, tokens, stop=()):
    """What comes with each token, and at the end."""
    stream, found = TextStream(tokenizer, prompt, stop), []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(prompt=TEXT.filter(bool), text=TEXT.filter(bool))
@example(prompt="a", text="🙂")
@example(prompt="a", text=" a a")
def test_pieces_add_up_to_the_text_and_none_has_a_broken_character(kind, prompt, text):
    tokenizer = TOKENIZERS[kind]
    before, after = tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(text, start=False)
    found = pieces(tokenizer, before, after)
    assert "".join(found) == tokenizer.decode([*before, *after]).removeprefix(tokenizer.decode(before))
    assert "".join(found).endswith(text)
    assert not any(BROKEN in piece for piece in found)


def test_spaces_within_a_text_are_kept_where_those_at_its_beginning_are_not():
    tokenizer = ALL["two spaces fewer"]
    space, b = (tokenizer._vocab[name] for name in ("▁", "b"))
    for before in ([b], [b, *[space] * 70], [b, *[tokenizer.end_of_text_id] * 70]):
        assert "".join(pieces(tokenizer, before, [space, space, b, space, b])) == "  b b"


@pytest.mark.parametrize("kind", ALL)
@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_any_tokens_at_all_are_written_as_in_the_whole_text(kind, data):
    tokenizer = ALL[kind]
    some = st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(sorted(tokenizer.special_tokens))
    if tokenizer.byte_tokens:
        letters = [tokenizer.encode_prompt(letter, start=False)[-3:] for letter in "ပ海"]
        some |= st.sampled_from([token for letter in letters for token in letter])
    before = data.draw(st.lists(some, max_size=5)) * data.draw(st.sampled_from([1, 40]))
    after = data.draw(st.lists(some, max_size=12))
    whole, prompt = tokenizer.decode([*before, *after]), tokenizer.decode(before)
    if whole.startswith(prompt):  # the answer may complete a prompt's last character
        assert prompt + "".join(pieces(tokenizer, before, after)) == whole


def test_letters_of_many_bytes_are_written_behind_any_number_of_them():
    tokenizer = ALL["sentencepiece"]
    letter = tokenizer.encode_prompt("ပ", start=False)[-3:]
    for count in (20, 21, 22, 23, 70):
        assert "".join(pieces(tokenizer, letter * count, letter * 4)) == "ပပပပ"


def test_a_stop_string_ends_the_answer_as_soon_as_it_is_there():
    """Also among bytes that may still change."""
    tokenizer = ALL["sentencepiece"]
    tokens = [tokenizer.encode_prompt(letter, start=False)[1:] for letter in "ပ\nပ"]
    assert pieces(tokenizer, [], [token for letter in tokens for token in letter], ["\n"]) == ["", "", "", "ပ"]


def test_a_stop_string_may_name_special_tokens_and_they_are_not_part_of_the_text():
    tokenizer = ALL["bytes and pieces"]
    end, a, b = (tokenizer._vocab[name] for name in ("<|im_end|>", "▁a", "b"))
    byte = tokenizer._vocab["<0x78>"]
    for stop, text in {
        "<|im_end|>": " ab",
        "b<|im": " a",
        "<|im_end|>x": " ab",
        "<|im_end|><|im_end|>": " abx",
        "bx": " a" + "bx" + " a",
        "im_end|>x": " ab",
        "<|im_end|> a": " abx",
    }.items():
        assert "".join(pieces(tokenizer, [a], [a, b, end, byte, end, end, a], [stop])) == text, stop
    assert pieces(tokenizer, [a], [end, end, a]) == ["", "", " a", ""]
    assert "".join(pieces(tokenizer, [a], [byte, end], ["<|im_end|>"])) == "x"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_bytes_that_are_no_character_are_told_as_broken_once_that_is_certain(kind):
    tokenizer = TOKENIZERS[kind]
    smile = tokenizer.encode_prompt("🙂", start=False)[-4:]
    letter = tokenizer.encode_prompt("ab", start=False)[-1]
    assert pieces(tokenizer, smile, smile)[:3] == ["", "", ""]
    *before, last = pieces(tokenizer, smile, smile[:2])
    assert before == ["", ""]
    assert set(last) == {BROKEN}
    *_, cut, end = pieces(tokenizer, smile, [*smile[:2], letter])
    assert cut.strip(BROKEN) == "b"
    assert end == ""


@settings(deadline=None)
@given(text=st.text(alphabet="ab", max_size=30), stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
@example(text="abab", stop=["bab"])
def test_text_ends_before_the_first_stop_string_wherever_tokens_meet(text, stop):
    tokenizer = TOKENIZERS["bytes"]
    tokens = [token for letter in text for token in tokenizer.encode_prompt(letter, start=False)]
    found = pieces(tokenizer, tokenizer.encode_prompt("a"), tokens, stop)
    seen = ""
    ends = [place for place in range(len(text) + 1) if any(text[:place].endswith(word) for word in stop)]
    if ends:
        begun = text[: ends[0]]
        seen = begun[: min(begun.find(word) for word in stop if word in begun)]
    assert "".join(found) == (seen if ends else text)


def test_what_may_become_a_stop_string_waits_and_comes_with_the_end():
    tokenizer = TOKENIZERS["bytes"]
    tokens = [token for letter in "xEN" for token in tokenizer.encode_prompt(letter, start=False)]
    assert pieces(tokenizer, [], tokens, ["END"]) == ["x", "", "", "EN"]
