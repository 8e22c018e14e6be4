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


TOKENIZERS = {"bytes": train_tokenizer(["a few words, bees and 海 é"], 280), "sentencepiece": sentencepiece()}
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
