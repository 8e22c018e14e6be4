"""Tokens to text as they come: no character that may still change, no piece of a stop string."""

from collections.abc import Sequence

from nsa_lightning.data.tokenizer import Tokenizer

_CONTEXT = 64  # tokens of the prompt that may change how the first one after it is written, such as its leading space
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer: what the tokenizer makes of prompt and answer together, behind that of the prompt.

    Text is held back while it may still change: the bytes of an unfinished character, or what may become a stop string.
    Special tokens are not part of the text, but stop strings may name them.

    Args:
        tokenizer: of the model.
        prompt: tokens before the answer.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._bytes, self._special = tokenizer.byte_tokens, tokenizer.special_tokens
        self._tokens = list(prompt[self._start(prompt) :])  # what was settled last, and what was not yet
        self._settled = len(self._tokens)
        self._names: list[tuple[int, str]] = []  # special tokens since then, and where in the text they stand
        self._held: list[tuple[str, bool]] = []  # settled characters, and whether the text has them or a name does
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token; nothing more once a stop string has come."""
        name = self._special.get(token)
        if name is not None:
            self._names.append((len(self._added()), name))
        self._tokens.append(token)
        added = self._added()
        if not self._may_change(added):
            self._settle(added)
            return self._release([])
        return self._release(self._characters(added.rstrip(_BROKEN)))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        self._settle(self._added())
        text = self._release([])
        if self.stopped:
            return text
        text += _visible(self._held)
        self._held = []
        return text

    def _start(self, prompt: Sequence[int]) -> int:
        """Where the end of the prompt begins that the answer's text depends on.

        Not within bytes, whose text depends on all of them that stand together.
        """
        start = len(prompt)
        while start:
            start = max(start - _CONTEXT, 0)
            while start and (prompt[start] in self._bytes or prompt[start] in self._special):
                start -= 1
            if self._holds_its_beginning(prompt[start:]):
                break
        return start

    def _holds_its_beginning(self, tokens: Sequence[int]) -> bool:
        """Whether what a tokenizer leaves out at a text's beginning, its spaces, is nothing behind these tokens."""
        return bool(self._tokenizer.decode(tokens).strip())

    def _added(self) -> str:
        """The text of the tokens that are not settled."""
        before = self._tokenizer.decode(self._tokens[: self._settled])
        return self._tokenizer.decode(self._tokens)[len(before) :]

    def _may_change(self, added: str) -> bool:
        """Whether the next token may change the text: it may complete a character, or break those before it."""
        last = next((token for token in reversed(self._tokens) if token not in self._special), None)
        return added.endswith(_BROKEN) or last in self._bytes

    def _settle(self, added: str) -> None:
        """Take the text for certain. Of the tokens those stay that the next one's text depends on."""
        self._held += self._characters(added)
        self._names = []
        if added:
            fresh = self._tokens[self._settled :]
            self._tokens = fresh if self._holds_its_beginning(fresh) else self._tokens
            self._settled = len(self._tokens)

    def _characters(self, added: str) -> list[tuple[str, bool]]:
        """The characters of a text with the names of special tokens that stand among them."""
        found, done = [], 0
        for place, name in self._names:
            found += [(letter, True) for letter in added[done:place]] + [(letter, False) for letter in name]
            done = max(done, place)
        return found + [(letter, True) for letter in added[done:]]

    def _release(self, uncertain: list[tuple[str, bool]]) -> str:
        """The part of the settled text that stands before any stop string, whole or begun.

        Args:
            uncertain: what follows it if nothing else comes: a stop string in it ends the answer as well.
        """
        if self.stopped:
            return ""
        together = self._held + uncertain
        text = "".join(letter for letter, _ in together)
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, []
            return _visible(together[: min(found)])
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        released = self._held[:certain]
        self._held = self._held[certain:]
        return _visible(released)


def _visible(characters: list[tuple[str, bool]]) -> str:
    """The text without the names of special tokens."""
    return "".join(letter for letter, visible in characters if visible)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))
