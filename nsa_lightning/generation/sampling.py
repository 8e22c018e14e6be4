"""The next token of each sequence from its logits."""

from dataclasses import dataclass

import torch
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_types
from torch import Tensor

# B sequences, V tokens in the vocabulary.


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is drawn: repetitions are penalised, then temperature, top_k and top_p apply, in this order.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""

    top_k: int | None = None
    """Draw among this many likeliest tokens; among all if not given."""

    top_p: float = 0.95
    """Draw among the fewest likeliest tokens that have this probability together."""

    repetition_penalty: float = 1.0
    """Divides positive logits and multiplies negative ones of tokens that the prompt or the answer holds."""

    seed: int = 0
    """Every prompt's own random numbers start from it: its answer does not depend on the other prompts."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.temperature < float("inf"):
            raise SettingError(f"temperature must be at least 0 and finite, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise SettingError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        if not 0 <= self.seed < 2**63:
            raise SettingError(f"seed must be from 0 to 2^63 - 1, got {self.seed}")


class Sampler:
    """Draws the next tokens of a batch whose rows are given to one prompt after another.

    Random numbers come from the host, one a token: a seed means the same on every device.
    """

    def __init__(self, config: SamplingConfig, batch_size: int, vocab_size: int, device: torch.device) -> None:
        self.config = config
        self._generators = [torch.Generator() for _ in range(batch_size)]
        size = (batch_size, vocab_size) if config.repetition_penalty != 1 else (batch_size, 0)
        self._seen = torch.zeros(size, dtype=torch.bool, device=device)

    def begin(self, row: int, prompt: Tensor, seed: int | None = None) -> None:
        """Give a row to a prompt, int64 [L]; its random numbers start from `seed`, or from that of the config."""
        self._generators[row].manual_seed(self.config.seed if seed is None else seed)
        if self.config.repetition_penalty != 1:
            self._seen[row] = False
            self._seen[row, prompt] = True

    @torch.inference_mode()
    def choose(self, logits: Tensor, rows: list[int]) -> list[int]:
        """The next token of some rows, whose logits are [len(rows), V] in this order.

        Raises:
            ValueError: the logits are not finite.
        """
        logits = logits.float()
        if self.config.repetition_penalty != 1:
            logits = penalised(logits, self._seen[rows], self.config.repetition_penalty)
        if self.config.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            uniform = [torch.rand((), dtype=torch.float64, generator=self._generators[row]) for row in rows]
            tokens = draw(filtered(logits, self.config), torch.stack(uniform).to(logits.device))
        finite = logits.logsumexp(-1).isfinite()
        chosen: list[int] = tokens.where(finite, -1).tolist()
        if -1 in chosen:
            raise SettingError("model must give finite logits, got some that are not: its weights are broken")
        if self.config.repetition_penalty != 1:
            self._seen[rows, tokens] = True
        return chosen


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [B, V] with those that were `seen`, bool [B, V], made less likely (arXiv:1909.05858, sec. 4.1)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Tensor, config: SamplingConfig) -> Tensor:
    """Logits [B, V] by temperature, -inf for tokens that top_k or top_p leave out; the likeliest always stays."""
    logits = (logits - logits.amax(-1, keepdim=True)) / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        last = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < last, -torch.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probability = ordered.softmax(-1)
        likelier = probability.cumsum(-1) - probability  # of all tokens before
        logits = logits.scatter(-1, order, ordered.masked_fill(likelier >= config.top_p, -torch.inf))
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens, int64 [B], by the softmax of logits [B, V] at numbers from [0, 1), float64 [B]."""
    reached = logits.double().softmax(-1).cumsum(-1)
    return (reached <= uniform[:, None] * reached[:, -1:]).sum(-1)
