"""The loss of texts by the position in them from which a token is predicted."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nsa_kernels.errors import SettingError

from nsa_lightning.data.documents import iter_documents
from nsa_lightning.data.settings import TextSettings
from nsa_lightning.data.sources import Part, find_files
from nsa_lightning.data.token_store import TokenStore
from nsa_lightning.evaluation.case import GREEDY, Answer, Case, PlannedCase
from nsa_lightning.evaluation.prompt_form import PromptForm
from nsa_lightning.evaluation.results import fingerprint
from nsa_lightning.generation.generate import StopConfig
from nsa_lightning.training.metrics import LossByPosition


class PositionTask:
    """The first tokens of documents that have so many, each counted once.

    What a causal model makes of a shorter text is part of what it makes of a longer one: the longest length says all.

    Args:
        texts: a set of `nsa prepare`, of which validation documents are read; or text, code and jsonl files.
        samples: documents.
        length: tokens of each.
        form: whose tokenizer it is.

    Raises:
        ValueError: there are too few such documents, or the set was made by another tokenizer.
    """

    name = "positions"
    sampling = GREEDY
    stop = StopConfig()

    def __init__(self, texts: Sequence[str], samples: int, length: int, form: PromptForm) -> None:
        self._length = length
        found = (tokens[:length] for tokens in _documents(texts, form) if len(tokens) >= length)
        self._documents = [tokens for tokens, _ in zip(found, range(samples), strict=False)]
        if len(self._documents) < samples:
            raise SettingError(
                f"texts must have {samples} documents of the longest of lengths, {length} tokens, got "
                f"{len(self._documents)} in {list(texts)}"
            )
        self.settings: Mapping[str, Any] = {"documents": fingerprint({"tokens": self._documents})}

    def cases(self) -> list[PlannedCase]:
        """By document."""
        return [
            PlannedCase(str(number), self._length, None, partial(Case, prompt=tokens, answers=[], whole=True))
            for number, tokens in enumerate(self._documents)
        ]

    def score(self, case: Case, answer: Answer) -> dict[str, float]:
        """Mean loss in nats a token, of all and from each position on."""
        losses, metric = -torch.tensor(answer.log_probs), LossByPosition()
        metric.update(losses, torch.arange(len(losses)), torch.ones_like(losses, dtype=torch.bool))
        by_position = {f"loss/{start}": float(loss) for start, loss in metric.compute().items()}
        return {"loss": float(losses.mean())} | by_position


def _documents(texts: Sequence[str], form: PromptForm) -> Iterator[list[int]]:
    """Tokens of documents, without the one that ends them."""
    if len(texts) == 1 and (Path(texts[0]) / "manifest.json").is_file():
        yield from _prepared(Path(texts[0]), form)
        return
    try:
        files = find_files(texts)
    except SettingError as error:
        raise SettingError(f"texts: {error}") from error
    parts = (Part(file.name, 0, None, file.size) for file in files)
    for document in iter_documents(parts, TextSettings(sources=list(texts), skip_binary=True)):
        yield form.text(document.text)


def _prepared(place: Path, form: PromptForm) -> Iterator[list[int]]:
    store = TokenStore(place)
    if store.manifest.tokenizer != form.tokenizer.fingerprint:
        raise SettingError(f"texts must be a set of the model's own tokenizer, got {place}")
    split = store.split("val")
    for start, stop in zip(split.offsets[:-1].tolist(), split.offsets[1:].tolist(), strict=True):
        if stop - start > 1:
            yield split.read(np.array([start]), np.array([stop - start - 1])).tolist()
