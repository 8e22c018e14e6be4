"""Our models as a language model of lm-evaluation-harness (`lm_eval`, of the extra `eval`)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nsa_lightning.evaluation.case import GREEDY, Answer, Case
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.suite import Ask
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.generation.sampling import SamplingConfig

_MAX_NEW_TOKENS = 256  # where a task does not say


class EvaluatedLM(TemplateLM):
    """Answers the requests of `lm_eval`.

    Args:
        ask: the model.
        form: of its prompts.
        max_seq_len: tokens of its context; of longer requests the beginning is left out.
    """

    def __init__(self, ask: Ask, form: PromptForm, max_seq_len: int) -> None:
        super().__init__()
        self._ask, self._form, self._max_seq_len = ask, form, max_seq_len

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text, which stands before a text that has nothing before it."""
        return self._form.tokenizer.end_of_text_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text; of a conversation those that its template names."""
        if self._form.is_chat or add_special_tokens is False:
            return self._form.tokenizer.encode_prompt(string, start=False)
        return self._form.text(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it: the messages together are one of the user's."""
        return self._form.conversation("\n\n".join(message["content"] for message in chat_history))

    @property
    def tokenizer_name(self) -> str:
        """What the prompts depend on."""
        return f"{self._form.tokenizer.fingerprint} {self._form.name}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Its text is of no use to `lm_eval`, which asks for it to tell it."""
        return ""

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of the context that do not overlap in what they predict."""
        windows = []
        for request in requests:
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            pieces = get_rolling_token_windows(tokens, self.prefix_token_id, self._max_seq_len, 1)
            windows.append([make_disjoint_window(piece) for piece in pieces])
        flat = [(("", ""), context, continuation) for pieces in windows for context, continuation in pieces]
        found = iter(self._loglikelihood_tokens(flat))
        return [sum(next(found)[0] for _ in pieces) for pieces in windows]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers up to stop strings; those of equal settings share batches."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            settings = requests[numbers[0]].args[1]
            limit = min(int(settings.get("max_gen_toks", _MAX_NEW_TOKENS)), self._max_seq_len - 1)
            until = settings.get("until") or []
            stop = StopConfig(max_new_tokens=limit, stop=[until] if isinstance(until, str) else list(until))
            room = self._max_seq_len - limit
            cases = [
                Case(prompt=self.tok_encode(requests[number].args[0])[-room:], answers=[], max_new_tokens=limit)
                for number in numbers
            ]
            found = self._asked(cases, stop, _sampling(settings))
            for number, answer in zip(numbers, found, strict=True):
                texts[number] = answer.text
        return texts

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether it was the likeliest, token by token."""
        cases = []
        for _, context, continuation in requests:
            room = self._max_seq_len + 1 - len(continuation)
            cases.append(Case(prompt=context[-room:] if room > 0 else context[-1:], answers=[], expected=continuation))
        found = self._asked(cases, StopConfig(), GREEDY)
        return [(float(sum(answer.log_probs)), answer.likeliest) for answer in found]

    def _asked(self, cases: Sequence[Case], stop: StopConfig, sampling: SamplingConfig) -> list[Answer]:
        """Answers in the order of the cases; equal ones are asked once."""
        names = [_digest(case, stop, sampling) for case in cases]
        answers = self._ask(dict(zip(names, cases, strict=True)), stop, sampling)
        return [answers[name] for name in names]


def _sampling(settings: Mapping[str, Any]) -> SamplingConfig:
    """What a task asks for; greedy where it does not sample."""
    temperature = float(settings.get("temperature") or 0.0)
    if not settings.get("do_sample", temperature > 0) or temperature == 0:
        return GREEDY
    return SamplingConfig(temperature=temperature, top_p=float(settings.get("top_p", 1.0)), top_k=settings.get("top_k"))


def _digest(case: Case, stop: StopConfig, sampling: SamplingConfig) -> str:
    """The same for the same request in every run."""
    parts = [case.prompt, case.expected, case.max_new_tokens, list(stop.stop), vars(sampling)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
