"""The decoder as a model of `transformers`: what `AutoModelForCausalLM` makes of an exported directory.

Importing this module registers it; a directory's own `modeling_nsa.py` imports it for `trust_remote_code=True`.
"""

from typing import Any

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa_lightning.checkpoint.directory import MODEL_TYPE
from nsa_lightning.model.cache import Cache as TransformerCache
from nsa_lightning.model.transformer import Transformer, TransformerConfig


class NSAConfig(PretrainedConfig):
    """Settings of an exported model; `transformer` holds those of the decoder."""

    model_type = MODEL_TYPE

    def __init__(self, transformer: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.transformer = transformer
        super().__init__(**kwargs)


class NSACache(Cache):
    """Our cache as `transformers` hands it from step to step.

    Args:
        model: whose keys and values it keeps.
        batch_size: rows of the batch (B).
        capacity: tokens of a row, prompt and continuation.
    """

    is_compileable = False  # by `transformers`

    def __init__(self, model: "NSAForCausalLM", batch_size: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.kept = TransformerCache.allocate(model.model.config, batch_size, capacity, model.device, model.dtype)
        self._seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that are in the cache, padding included."""
        return self._seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beams, which change places."""
        raise SettingError("num_beams must be 1 with a cache of NSACache, whose rows keep their places")

    def crop(self, max_length: int) -> None:
        """Refuse to take tokens back, as assisted generation does."""
        raise SettingError("assistant_model must be unset with a cache of NSACache, which takes no token back")

    def extend(self, model: Transformer, input_ids: Tensor, real: Tensor) -> Tensor:
        """Append new columns of the batch; final hidden states of the last one, [B, hidden_size].

        Args:
            model: the decoder.
            input_ids: int64 [B, L], the last column without padding.
            real: False at padding, [B, L].
        """
        first, self._seen = self._seen == 0, self._seen + input_ids.shape[1]
        if input_ids.shape[1] == 1 and not first:
            return model.decode(input_ids[:, 0], self.kept)
        rows = zip(input_ids, real, strict=True)
        return torch.stack([model.prefill(ids[mask], self.kept, row) for row, (ids, mask) in enumerate(rows)])


class NSAForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its output layer. Greedy search and sampling have a cache; others read the whole text again."""

    config_class = NSAConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers declares it so)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        if config.transformer is None:
            raise SettingError("config.transformer must hold the decoder's settings, got none")
        self.model = Transformer(TransformerConfig.from_dict(config.transformer))
        self.lm_head = self.model.lm_head
        del self.model.lm_head  # its name in a Hugging Face directory has no prefix
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The decoder has given itself its first weights."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding of tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output layer."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: NSACache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a batch; each row is a document, packed without its padding.

        Args:
            input_ids: int64 [B, L].
            attention_mask: 0 at padding, on either side, else 1, [B, L]; with a cache it has earlier columns too.
            labels: the tokens again, -100 where they are not scored, [B, L]; asks for the mean loss.
            logits_to_keep: of the last positions alone; 0 for all.
            past_key_values: tokens before these, which are appended to it; only the last column's logits are returned
                then, and padding may stand on the left alone.
            kwargs: what else `transformers` hands over; `num_items_in_batch` counts for the loss.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if past_key_values is not None:
            hidden = past_key_values.extend(self.model, input_ids, real[:, -input_ids.shape[1] :])
            return CausalLMOutputWithPast(logits=self.lm_head(hidden)[:, None], past_key_values=past_key_values)
        lengths = real.sum(1)
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        positions = (real.cumsum(1) - 1)[real]  # [T]
        packed = self.model(input_ids[real], positions, cu_seqlens, int(lengths.max())).hidden
        hidden = packed.new_zeros(*input_ids.shape, packed.shape[-1]).masked_scatter(real.unsqueeze(-1), packed)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.model.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: NSACache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache does not have, all of them at every step where there is none."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs = {"attention_mask": attention_mask, "past_key_values": past_key_values, "logits_to_keep": 1}
        return inputs | {"input_ids": input_ids[:, seen:]}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """A cache where rows keep their places from step to step and nothing is taken back."""
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        steady = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if steady and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            rows = batch_size * generation_config.num_return_sequences
            model_kwargs["past_key_values"] = NSACache(self, rows, max(max_cache_length, 1))


AutoConfig.register(MODEL_TYPE, NSAConfig, exist_ok=True)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM, exist_ok=True)
