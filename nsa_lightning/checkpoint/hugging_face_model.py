"""The decoder as a model of `transformers`: what `AutoModelForCausalLM` makes of an exported directory.

Importing this module registers it; a directory's own `modeling_nsa.py` imports it for `trust_remote_code=True`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa_lightning.checkpoint.directory import MODEL_TYPE
from nsa_lightning.model.transformer import Transformer, TransformerConfig


class NSAConfig(PretrainedConfig):
    """Settings of an exported model; `transformer` holds those of the decoder."""

    model_type = MODEL_TYPE

    def __init__(self, transformer: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.transformer = transformer
        super().__init__(**kwargs)


class NSAForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder with its output layer. It has no cache: every generated token reads the whole text again."""

    config_class = NSAConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers declares it so)
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        if config.transformer is None:
            raise ValueError("config.transformer must hold the decoder's settings, got none")
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
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a batch; each row is a document, packed without its padding.

        Args:
            input_ids: int64 [B, L].
            attention_mask: 0 at padding, on either side, else 1, [B, L].
            labels: the tokens again, -100 where they are not scored, [B, L]; asks for the mean loss.
            logits_to_keep: of the last positions alone; 0 for all.
            kwargs: what else `transformers` hands over; `num_items_in_batch` counts for the loss.
        """
        real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
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
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """All tokens, at every step."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}


AutoConfig.register(MODEL_TYPE, NSAConfig, exist_ok=True)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM, exist_ok=True)
