"""Models and prompts for tests of the evaluation."""

from functools import cache

from nsa_lightning.data.tokenizer import train_tokenizer
from nsa_lightning.evaluation.prompt_form import PromptForm


@cache
def completion():
    """Texts to be continued, of a tokenizer with few tokens."""
    return PromptForm(train_tokenizer(["some special magic numbers of the following text\n" * 20], 300))
