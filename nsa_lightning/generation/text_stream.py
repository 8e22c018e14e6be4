"""Tokens to text as they come: no broken character, no piece of a stop string."""

from collections.abc import Sequence

from nsa_lightning.data.tokenizer import Tokenizer

_CONTEXT = 64  # tokens of the prompt that may change how the first one after it is written, such as its leading space
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer.

    Text is held back while it may still change: the bytes of an unfinished character, or what may become a stop string.

    Args:
        tokenizer: of the model.
        prompt: tokens before the answer.
        stop: strings that end the answer and are not part of it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens = list(prompt[-_CONTEXT:])  # what was written last, and what was not yet
        self._written = len(self._tokens)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token; nothing more once a stop string has come."""
        self._tokens.append(token)
        return self._release(self._decoded(hold_broken=True), last=False)

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        return self._release(self._decoded(hold_broken=False), last=True)

    def _decoded(self, hold_broken: bool) -> str:
        """The text of the tokens that are not yet written, or none of it while its last character is broken."""
        text = self._tokenizer.decode(self._tokens)
        if hold_broken and text.endswith(_BROKEN):
            return ""
        added = text[len(self._tokenizer.decode(self._tokens[: self._written])) :]
        if added:
            self._tokens = self._tokens[self._written :]
            self._written = len(self._tokens)
        return added

    def _release(self, text: str, last: bool) -> str:
        """The part of the held and the new text that stands before any stop string, whole or begun."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    return next(size for size in range(min(len(text), len(stop) - 1), -1, -1) if text.endswith(stop[:size]))
