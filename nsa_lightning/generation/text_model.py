"""A trained model with what generation needs beside its weights: the tokenizer, the end of a text, its context."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from nsa_kernels.errors import SettingError

from nsa_lightning.checkpoint.convert import RopeChange
from nsa_lightning.checkpoint.trained import Trained, open_trained
from nsa_lightning.checkpoint.weights import hugging_face_name
from nsa_lightning.data.token_names import end_of_text_ids
from nsa_lightning.data.tokenizer import Tokenizer
from nsa_lightning.generation.chat import ChatTemplate
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.generation.device import check_memory
from nsa_lightning.generation.prompts import Prompt
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.initialization import copy_whole, materialise
from nsa_lightning.model.transformer import Transformer


class TextModel(NamedTuple):
    """What a text is continued with."""

    config: TransformerConfig
    trained: Trained
    tokenizer: Tokenizer
    directory: Path  # of the tokenizer's files
    end_tokens: frozenset[int]
    max_seq_len: int  # tokens of the context it is made for, the RoPE scaling included

    def encode(self, prompts: Sequence[Prompt], chat: bool) -> list[list[int]]:
        """Tokens of each prompt, or of a conversation that begins with it if `chat`.

        Raises:
            ValueError: there is no chat template, or a prompt has no tokens.
        """
        template = ChatTemplate(self.directory) if chat else None
        texts = [template.render(prompt.text) if template is not None else prompt.text for prompt in prompts]
        tokens = [self.tokenizer.encode_prompt(text, start=not chat) for text in texts]
        for prompt, found in zip(prompts, tokens, strict=True):
            if not found:
                raise SettingError(f"a prompt must have tokens, {prompt.name} has none")
        return tokens

    def decoder(
        self, batch_size: int, capacity: int, device: torch.device, dtype: torch.dtype, cuda_graphs: bool
    ) -> Decoder:
        """The model with its weights, and an empty cache; arguments as `Decoder` has them.

        Raises:
            ValueError: the memory does not suffice.
        """
        check_memory(self.config, batch_size, capacity, device, dtype)
        return Decoder(self.load(device, dtype), batch_size, capacity, cuda_graphs)

    def load(self, device: torch.device, dtype: torch.dtype) -> Transformer:
        """The model with its weights, to decode with."""
        with torch.device("meta"):
            model = Transformer(self.config).to(dtype).requires_grad_(False)
        materialise(model, device)
        for name, parameter in model.named_parameters():
            copy_whole(parameter, self.trained.read(hugging_face_name(name)))
        model.join_projections()
        return model.eval()

    def remark(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> str | None:
        """What to tell where the longest prompt and its answer exceed the context; None where they do not."""
        longest, rope = max(map(len, prompts)), self.config.rope
        if longest + new_tokens <= self.max_seq_len:
            return None
        original = rope.original_max_seq_len or self.max_seq_len / rope.factor
        scaling = "yarn" if rope.scaling == "none" else rope.scaling
        factor = math.ceil((longest + new_tokens) / original)
        return (
            f"{longest} tokens of a prompt and max_new_tokens={new_tokens} exceed the context of {self.max_seq_len} "
            f"tokens that the model is made for; --rope.scaling {scaling} --rope.factor {factor} reaches so far"
        )


def open_text_model(model: Path, tokenizer: Path | None, rope: RopeChange) -> TextModel:
    """Open a model; arguments as `nsa generate` has them. No weights are read yet.

    Raises:
        ValueError: there is no such model, it has no tokenizer or another model's, or the RoPE change does not fit it.
    """
    trained = open_trained(model, "model")
    place = tokenizer or trained.tokenizer
    if place is None:
        raise SettingError(
            f"tokenizer must be given where the run of the checkpoint has no tokenizer.json, got none for model={model}"
        )
    directory = place if place.is_dir() else place.parent
    found = _read_tokenizer(place, directory)
    if found.vocab_size > trained.config.vocab_size:
        raise SettingError(
            f"tokenizer must have at most the {trained.config.vocab_size} tokens of the model, "
            f"got {found.vocab_size} in {place}"
        )
    changed = rope.apply(trained.config.rope, trained.max_seq_len)
    max_seq_len = rope.reach(trained.config.rope, trained.max_seq_len)
    ends = frozenset([*end_of_text_ids(directory), *end_of_text_ids(model), found.end_of_text_id])
    return TextModel(replace(trained.config, rope=changed), trained, found, directory, ends, max_seq_len)


def _read_tokenizer(place: Path, directory: Path) -> Tokenizer:
    """The tokenizer, whose texts end with the token that its settings name, or a usual one."""
    file = place / "tokenizer.json" if place.is_dir() else place
    try:
        state = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"tokenizer must be a tokenizer.json or its directory, got {place}: {error}") from error
    try:
        return Tokenizer(state, None, directory)
    except SettingError as error:
        raise SettingError(f"tokenizer={place}: {error}") from error
