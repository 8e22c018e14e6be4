"""Text to tokens and back: a trained byte-level BPE, or any `tokenizer.json`."""

import hashlib
import heapq
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from nsa_kernels.errors import SettingError
from numpy.typing import NDArray

from nsa_lightning.data.documents import text_fraction
from nsa_lightning.data.storage import whole_file
from nsa_lightning.paths import expand_path

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "[EOS]",
)
"""Where `end_of_text` is looked for, in this order."""

MIN_VOCAB_SIZE = 257
CHUNK = 2**18  # characters; a longer document is encoded in chunks, in parallel
GROUP = 2**22  # characters whose encodings are alive at once: they take hundreds of bytes a token


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns documents into tokens."""

    path: str | None = None
    """A `tokenizer.json`, or a directory that has one. Left out: a byte-level BPE is trained on the training split."""

    vocab_size: int = 4096
    """Number of tokens of the trained BPE, at least 257: one for each byte and <|endoftext|>. Unused with `path`."""

    end_of_text: str | None = None
    """The token of `path` that ends each document. Left out: the first usual name it knows, such as <|endoftext|>."""

    def __post_init__(self) -> None:
        if self.vocab_size < MIN_VOCAB_SIZE:
            raise SettingError(f"data.tokenizer.vocab_size must be at least {MIN_VOCAB_SIZE}, got {self.vocab_size}")
        if self.path is None and self.end_of_text not in (None, END_OF_TEXT):
            raise SettingError(
                f"data.tokenizer.end_of_text={self.end_of_text!r} needs data.tokenizer.path, which is not set"
            )


class Tokenizer:
    """A `tokenizer.json` and the token that ends a document.

    Args:
        state: the text of a `tokenizer.json`.
        end_of_text: the token that ends each document; None looks for the usual names.

    Raises:
        ValueError: `state` is not a tokenizer, or has no such token.
    """

    def __init__(self, state: str, end_of_text: str | None = None) -> None:
        # Left unset, tokenizers 0.22 warns in every process that is forked after it has encoded anything.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(state)
        except Exception as error:  # the library raises nothing narrower
            raise SettingError(f"not a tokenizer.json: {error}") from error
        self._state = state
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is text
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
        known = [name for name in names if name in self._vocab]
        if not known:
            raise SettingError(
                f"data.tokenizer.end_of_text must name one of the tokenizer's tokens, it has none of {names}"
            )
        self.end_of_text = known[0]
        self.end_of_text_id = self._vocab[self.end_of_text]
        probe = self._tokenizer.encode("a")
        num_special = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), 0)
        self._start = np.asarray(probe.ids[:num_special], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the tokens of a document."""
        return hashlib.blake2b(f"{self._state}\0{self.end_of_text}".encode(), digest_size=16).hexdigest()

    @property
    def vocab_size(self) -> int:
        """The largest token id and one."""
        return max(self._vocab.values()) + 1

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes that each token stands for, int64 [vocab_size]; 0 for special tokens and unused ids.

        Over a document's tokens they add up to the document's bytes, exactly so for a byte-level tokenizer without a
        normalizer.
        """
        from tokenizers.pre_tokenizers import ByteLevel

        state = json.loads(self._state)
        byte_level = '"ByteLevel"' in json.dumps([state.get("pre_tokenizer"), state.get("decoder")])
        alphabet = set(ByteLevel.alphabet())
        added = self._tokenizer.get_added_tokens_decoder()
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for token, index in self._vocab.items():
            if index in added:
                lengths[index] = 0 if added[index].special else len(token.encode())
            elif byte_level and alphabet.issuperset(token):
                lengths[index] = len(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                lengths[index] = 1
            else:
                lengths[index] = len(token.replace("▁", " ").encode())
        lengths[self.end_of_text_id] = 0
        return lengths

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each document, int64: the tokenizer's own start, such as BOS, the text and `end_of_text`."""
        parts = [[self._start] for _ in texts]
        for group in _groups(texts):
            encodings = self._tokenizer.encode_batch_fast([chunk for _, chunk in group], add_special_tokens=False)
            for (document, _), encoding in zip(group, encodings, strict=True):
                parts[document].append(np.asarray(encoding.ids, dtype=np.int64))
        return [np.concatenate([*part, [self.end_of_text_id]]) for part in parts]

    def encode_prompt(self, text: str, *, start: bool = True) -> list[int]:
        """Tokens of a text to be continued, in which the names of special tokens stand for them.

        Args:
            text: the prompt.
            start: begin as documents do, with the tokenizer's own start, such as BOS.
        """
        self._tokenizer.encode_special_tokens = False
        try:
            tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True
        return [*self._start.tolist(), *tokens] if start else tokens

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `tokens`; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def save(self, path: Path) -> None:
        """Write the `tokenizer.json`, whole or not at all."""
        with whole_file(path) as stream:
            stream.write(self._state.encode())


def load_tokenizer(path: str, end_of_text: str | None = None) -> Tokenizer:
    """Open a `tokenizer.json` or the one in a directory.

    Raises:
        ValueError: there is none, it is broken, or it has no token that ends a document.
    """
    state = _read_state(path)
    try:
        return Tokenizer(state, end_of_text)
    except SettingError as error:
        raise SettingError(f"data.tokenizer.path={path!r}: {error}") from error


def vocab_size_of(path: str) -> int:
    """The `vocab_size` that `load_tokenizer(path)` has, read without loading the library."""
    try:
        state: dict[str, Any] = json.loads(_read_state(path))
        vocab = state["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        return max(chain(ids, (token["id"] for token in state["added_tokens"]))) + 1
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SettingError(f"data.tokenizer.path={path!r}: not a tokenizer.json: {error!r}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose one special token, <|endoftext|>, starts and ends each document.

    The same texts give the same tokenizer. Few texts may not fill `vocab_size`.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, library.token_to_id(END_OF_TEXT))]
    )
    return Tokenizer(library.to_str())


def training_sample(texts: Iterable[str], max_characters: int = 2**25) -> list[str]:
    """The first texts in hash order, about `max_characters` of them: a fair sample in bounded memory."""
    heap: list[tuple[float, str]] = []
    size = 0
    for text in texts:
        clipped = text[:max_characters]
        heapq.heappush(heap, (-text_fraction(text), clipped))
        size += len(clipped)
        while size - len(heap[0][1]) >= max_characters:
            size -= len(heapq.heappop(heap)[1])
    return [text for _, text in sorted(heap, reverse=True)]


def _read_state(path: str) -> str:
    file = Path(expand_path(path))
    file = file / "tokenizer.json" if file.is_dir() else file
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(
            f"data.tokenizer.path={path!r} must be a tokenizer.json or its directory: {error}"
        ) from error


def _chunks(text: str) -> Iterator[str]:
    """Cut a long text after line ends where it has some."""
    start = 0
    while len(text) - start > CHUNK:
        stop = text.rfind("\n", start, start + CHUNK) + 1 or start + CHUNK
        yield text[start:stop]
        start = stop
    yield text[start:]


def _groups(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Chunks of all texts, each with the index of its text, about `GROUP` characters at a time."""
    group: list[tuple[int, str]] = []
    size = 0
    for index, text in enumerate(texts):
        for chunk in _chunks(text):
            group.append((index, chunk))
            size += len(chunk)
            if size >= GROUP:
                yield group
                group, size = [], 0
    yield group
