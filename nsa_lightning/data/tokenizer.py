"""Text to tokens and back: a trained byte-level BPE, or any `tokenizer.json`."""

import hashlib
import heapq
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import numpy as np
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from numpy.typing import NDArray

from nsa_lightning.data.splits import text_fraction
from nsa_lightning.data.storage import whole_file
from nsa_lightning.data.token_names import END_OF_TEXT_NAMES, SETTINGS, find_end_of_text, read_settings
from nsa_lightning.paths import expand_path

Result = TypeVar("Result")

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
CHUNK = 2**18  # characters; a longer document is encoded in chunks, in parallel
LONG_WORD = re.compile(r"([^\W\d_]{128}|\d{128}|(?:[^\w\s]|_){128}|\s{128})")
"""Training takes time by the square of a word's length, so that words are cut here: DNA, base64, a million spaces."""

LONG_RUN = re.compile(r"\S{128}|\s{128}")  # is in a text with a long word, and found faster

GROUP = 2**22  # characters whose encodings are alive at once: they take hundreds of bytes a token


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer turns documents into tokens."""

    path: str | None = None
    """A `tokenizer.json`, or a directory that has one. Left out: a byte-level BPE is trained on the training split."""

    vocab_size: int = 4096
    """Number of tokens of the trained BPE, at least 257: one for each byte and <|endoftext|>. Unused with `path`."""

    end_of_text: str | None = None
    """The token of `path` that ends each document. Left out: what the files beside it name, such as
    tokenizer_config.json, else the first usual name it knows, such as <|endoftext|>."""

    def __post_init__(self) -> None:
        check_types(self, "data.tokenizer.")
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
        end_of_text: the token that ends each document; None looks for it.
        directory: of the files beside the `tokenizer.json`, which may name that token; None looks for the usual names.

    Raises:
        ValueError: `state` is not a tokenizer, or has no such token.
    """

    def __init__(self, state: str, end_of_text: str | None = None, directory: Path | None = None) -> None:
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
        name = end_of_text or self._find_end_of_text(directory)
        if name not in self._vocab:
            names = END_OF_TEXT_NAMES if end_of_text is None else (end_of_text,)
            raise SettingError(
                f"data.tokenizer.end_of_text must name one of the tokenizer's tokens, it has none of {names}"
            )
        self.end_of_text = name
        self.end_of_text_id = self._vocab[self.end_of_text]
        probe = self._tokenizer.encode("a")
        num_special = next((i for i, special in enumerate(probe.special_tokens_mask) if not special), 0)
        self._start = np.asarray(probe.ids[:num_special], dtype=np.int64)
        self._check_ids()

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the tokens of a document."""
        return hashlib.blake2b(f"{self._state}\0{self.end_of_text}".encode(), digest_size=16).hexdigest()

    @cached_property
    def vocab_size(self) -> int:
        """The largest token id and one, as `vocab_size_of` finds it."""
        return _count_ids(json.loads(self._state))

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every token stands for bytes of its own, so that `byte_lengths` of a text's tokens add up to it."""
        return _keeps_every_byte(json.loads(self._state))

    @cached_property
    def byte_lengths(self) -> NDArray[np.int64]:
        """UTF-8 bytes that each token stands for, int64 [vocab_size]; 0 for special tokens and unused ids.

        Over a document's tokens they add up to the document's bytes if `is_byte_level`. For other tokenizers, which
        drop spaces, change letters or know words not at all, they are an estimate: `encode_counted` is exact.
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

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """Names of the tokens that `decode` leaves out, by their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {index: token.content for index, token in added.items() if token.special}

    @cached_property
    def byte_tokens(self) -> frozenset[int]:
        """Tokens of one byte that `decode` reads together with the bytes beside them: no character if one is none."""
        falls_back = '"ByteFallback"' in json.dumps(json.loads(self._state).get("decoder"))
        known = (self._vocab.get(f"<0x{byte:02X}>") for byte in range(256 if falls_back else 0))
        return frozenset(token for token in known if token is not None)

    def token_id(self, name: str) -> int | None:
        """The id of a token, None where there is none of that name."""
        return self._vocab.get(name)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each document, int64: the tokenizer's own start, such as BOS, the text and `end_of_text`."""
        parts = [[self._start] for _ in texts]
        for document, _, encoding in self._encodings(texts, self._tokenizer.encode_batch_fast):
            parts[document].append(np.asarray(encoding.ids, dtype=np.int64))
        return [np.concatenate([*part, [self.end_of_text_id]]) for part in parts]

    def encode_counted(self, texts: Sequence[str]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """What `encode_batch` gives, and the UTF-8 bytes of the text that each token stands for, int64 as well.

        A token stands for all from the end of the token before it to its own end, `end_of_text` for what is left. So
        they add up to the bytes of the text, whatever the tokenizer drops or changes.
        """
        tokens = [[self._start] for _ in texts]
        ends = [[np.zeros_like(self._start)] for _ in texts]  # bytes of the text up to the end of each token
        sizes = [0 for _ in texts]
        for document, chunk, encoding in self._encodings(texts, self._tokenizer.encode_batch):
            tokens[document].append(np.asarray(encoding.ids, dtype=np.int64))
            characters = np.asarray([end for _, end in encoding.offsets], dtype=np.int64)
            places = _byte_offsets(chunk)
            ends[document].append(sizes[document] + places[np.maximum.accumulate(characters)])
            sizes[document] += int(places[-1])
        return [
            (np.concatenate([*own, [self.end_of_text_id]]), np.diff(np.concatenate([*reached, [size]]), prepend=0))
            for own, reached, size in zip(tokens, ends, sizes, strict=True)
        ]

    def _encodings(self, texts: Sequence[str], encode: Callable[..., list[Any]]) -> Iterator[tuple[int, str, Any]]:
        """The index of each text with its chunks and their encodings, in order."""
        for group in _groups(texts):
            chunks = [chunk for _, chunk in group]
            encodings = _interruptible(partial(encode, chunks, add_special_tokens=False))
            for (document, chunk), encoding in zip(group, encodings, strict=True):
                yield document, chunk, encoding

    def _check_ids(self) -> None:
        """Refuse tokens that the library gives an id of another one: it numbers on where the vocabulary has a gap."""
        names: dict[int, str] = {}
        for name, index in self._vocab.items():
            if names.setdefault(index, name) != name:
                raise SettingError(f"each token must have an id of its own, {names[index]!r} and {name!r} have {index}")

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
        """Write the `tokenizer.json`, whole or not at all, and beside it an end of text that has no usual name."""
        with whole_file(path) as stream:
            stream.write(self._state.encode())
        if self.end_of_text != self._find_end_of_text(path.parent):
            settings = read_settings(path.with_name(SETTINGS)) | {"eos_token": self.end_of_text}
            with whole_file(path.with_name(SETTINGS)) as stream:
                stream.write(json.dumps(settings, ensure_ascii=False).encode())

    def _find_end_of_text(self, directory: Path | None) -> str | None:
        added = self._tokenizer.get_added_tokens_decoder()
        return find_end_of_text(self._vocab, {index: token.content for index, token in added.items()}, directory)


def load_tokenizer(path: str, end_of_text: str | None = None) -> Tokenizer:
    """Open a `tokenizer.json` or the one in a directory.

    Raises:
        ValueError: there is none, it is broken, or it has no token that ends a document.
    """
    state, place = _read_state(path), Path(path).expanduser()
    try:
        return Tokenizer(state, end_of_text, place if place.is_dir() else place.parent)
    except SettingError as error:
        raise SettingError(f"data.tokenizer.path={path!r}: {error}") from error


def vocab_size_of(path: str) -> int:
    """The `vocab_size` that `load_tokenizer(path)` has, read without loading the library."""
    try:
        return _count_ids(json.loads(_read_state(path)))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise SettingError(f"data.tokenizer.path={path!r}: not a tokenizer.json: {error!r}") from error


def _count_ids(state: dict[str, Any]) -> int:
    """The largest id that a `tokenizer.json` tells or the library gives, and one.

    The library does not take the ids of added tokens from the file: those that the model does not know are numbered on
    from the number of its tokens. A file without gaps tells the same ids.
    """
    vocab, added = state["model"]["vocab"], state.get("added_tokens", [])
    known = vocab if isinstance(vocab, dict) else {piece: index for index, (piece, _) in enumerate(vocab)}
    given = len(vocab) + len({token["content"] for token in added} - known.keys())
    return max(chain([given - 1], known.values(), (token["id"] for token in added))) + 1


def _keeps_every_byte(state: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` is a byte-level BPE that neither changes the text nor leaves anything of it out."""
    from tokenizers.pre_tokenizers import ByteLevel

    model = state["model"]
    texts = [token for token in state.get("added_tokens", []) if not token.get("special")]  # are found in a text
    steps, others = _steps(state.get("pre_tokenizer")), []
    for step in steps:
        if step["type"] != "ByteLevel":
            others.append(step["type"] in ("Split", "Punctuation", "Digits") and step.get("behavior") != "Removed")
    return (
        model.get("type", "BPE") == "BPE"  # older files name no type
        and "merges" in model
        and not any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
        and set(ByteLevel.alphabet()) <= set(model["vocab"])
        and not _steps(state.get("normalizer"))
        and len(others) == len(steps) - 1
        and all(others)
        and not any(step.get("add_prefix_space") for step in steps)
        and not any(token.get("lstrip") or token.get("rstrip") for token in texts)
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part.get("normalizers", part.get("pretokenizers", [])) for step in _steps(each)]


def _byte_offsets(text: str) -> NDArray[np.int64]:
    """Where each character begins in the text's UTF-8 bytes, and where the last one ends, int64 [characters + 1]."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
    return np.append(0, np.cumsum(sizes))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose one special token, <|endoftext|>, starts and ends each document.

    The same texts give the same tokenizer. Few texts may not fill `vocab_size`. Longer words than any token of use are
    cut for the training alone.
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
    pieces = (
        piece for text in texts for piece in (LONG_WORD.split(text) if LONG_RUN.search(text) else [text]) if piece
    )
    _interruptible(partial(library.train_from_iterator, pieces, trainer))
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, library.token_to_id(END_OF_TEXT))]
    )
    return Tokenizer(library.to_str())


def _interruptible(action: Callable[[], Result]) -> Result:
    """What `action` returns. It runs in a thread, which Ctrl-C leaves behind: the library holds signals back."""
    results: list[Result] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # is raised below
            failures.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)  # the system may hand the signal to any thread, and this one must wake up to act on it
    if failures:
        raise failures[0]
    return results[0]


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
