"""A question as tokens: as a text to be continued, or as a message to a chat model."""

from pathlib import Path

from nsa_kernels.errors import SettingError

from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.generation.chat import ChatTemplate


class PromptForm:
    """Lays a question and the beginning of its answer out for a model.

    Args:
        tokenizer: of the model.
        directory: of its files, whose chat template is used; None gives texts to be continued.

    Raises:
        ValueError: there is no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, directory: Path | None = None) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(directory) if directory is not None else None

    @property
    def name(self) -> str:
        """`chat` or `completion`."""
        return "completion" if self._template is None else "chat"

    @property
    def is_chat(self) -> bool:
        """Whether questions are messages."""
        return self._template is not None

    def prompt(self, question: str, beginning: str = "") -> list[int]:
        """Tokens of a question and of the beginning of its answer, which is given to the model."""
        if self._template is not None:
            return self.tokenizer.encode_prompt(self._template.render(question) + beginning, start=False)
        return self.text(question + beginning)

    def conversation(self, question: str) -> str:
        """The text of a conversation up to where the answer begins, in the model's chat template."""
        assert self._template is not None
        return self._template.render(question)

    def plain(self) -> "PromptForm":
        """The same for texts to be continued."""
        return PromptForm(self.tokenizer)

    def text(self, text: str) -> list[int]:
        """Tokens of the beginning of a document; names of special tokens in it are text."""
        tokens: list[int] = self.tokenizer.encode_batch([text])[0][:-1].tolist()
        return tokens

    def with_answer(self, question: str, beginning: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of the prompt, and of an answer behind it as the tokenizer writes both together."""
        prompt, together = self.prompt(question, beginning), self.prompt(question, beginning + answer)
        if together[: len(prompt)] == prompt:
            return prompt, together[len(prompt) :]
        return prompt, self.tokenizer.encode_prompt(answer, start=False)

    def longest(self, question: str, limit: int, beginning: str = "") -> list[int]:
        """`prompt` of at most so many tokens: what is too much is taken from the middle of the question.

        Both ends of a long text matter more than its middle: instructions stand there (LongBench, arXiv:2308.14508).

        Raises:
            ValueError: not even an empty question has so few tokens.
        """
        prompt = self.prompt(question, beginning)
        if len(prompt) <= limit:
            return prompt
        tokens = self.tokenizer.encode_prompt(question, start=False)
        kept = limit
        while kept > 0:
            half = kept // 2
            ends = self.tokenizer.decode(tokens[:half]) + self.tokenizer.decode(tokens[len(tokens) - half :])
            prompt = self.prompt(ends, beginning)
            if len(prompt) <= limit:
                return prompt
            kept -= max(len(prompt) - limit, 2)
        raise SettingError(
            f"max_length must leave room for a question and its answer, got {limit} tokens for the prompt"
        )
