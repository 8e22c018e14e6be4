"""The decoder as a model of `transformers`: what `AutoModelForCausalLM` makes of an exported directory.

Importing this module registers it; a directory's own `modeling_nsa.py` imports it for `trust_remote_code=True`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

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
from transformers import initialization as init
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from nsa_lightning.checkpoint.directory import MODEL_TYPE, write_remote_code
from nsa_lightning.model.cached import Cache as TransformerCache
from nsa_lightning.model.cached import decode, prefill
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.transformer import Transformer

# B rows of a batch, L columns, T tokens that are not padding.

_LOSS_SETTINGS = ("num_items_in_batch", "ignore_index", "shift_labels")
_SAID_TWICE = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""What `DataCollatorWithFlattening` gives beside `position_ids`, which tell the same."""
_WITHOUT_EFFECT = ("cache_position", "token_type_ids", "return_dict")
_NEVER = {
    "inputs_embeds": "the model reads input_ids",
    "output_attentions": "NSA computes no matrix of attention weights",
    "output_hidden_states": "the states of single layers are not kept",
}


class NSAConfig(PretrainedConfig):
    """Settings of an exported model; `transformer` holds those of the decoder."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it so)

    def __init__(self, transformer: dict[str, Any] | None = None, use_cache: bool = True, **kwargs: Any) -> None:
        self.transformer = transformer
        self.use_cache = use_cache
        super().__init__(**kwargs)


class NSACache(Cache):
    """Our cache as `transformers` hands it from step to step. It grows where it has no room.

    Args:
        model: whose keys and values it keeps.
        batch_size: rows of the batch (B).
        capacity: tokens of a row for which room is made at once, prompt and continuation.
    """

    is_compileable = False  # by `transformers`

    def __init__(self, model: "NSAForCausalLM", batch_size: int, capacity: int = 0) -> None:
        super().__init__(layers=[])
        self.rows, self.capacity = batch_size, capacity
        self._config, self._dtype = model.model.config, model.dtype
        self.kept: TransformerCache | None = None  # made with the first tokens, whose device it has
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the batch that are in the cache, padding included."""
        return self._seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse beams, which change places."""
        self._refuse_other_rows()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse more rows than the cache has been made for."""
        self._refuse_other_rows()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse fewer rows."""
        self._refuse_other_rows()

    def crop(self, max_length: int) -> None:
        """Refuse to take tokens back, as assisted generation does."""
        raise SettingError("assistant_model must be unset with a cache of NSACache, which takes no token back")

    def _refuse_other_rows(self) -> NoReturn:
        raise SettingError("num_beams must be 1 with a cache of NSACache, whose rows keep their places")

    def remember(self, input_ids: Tensor, real: Tensor) -> None:
        """Take columns of the batch as `extend` does, but compute nothing before it is needed."""
        self._waiting.append((input_ids, real))
        self._seen += input_ids.shape[1]

    def row_lengths(self) -> list[int]:
        """Tokens of each row, without padding."""
        lengths = [0] * self.rows if self.kept is None else list(self.kept.host_lengths)
        for _, real in self._waiting:
            lengths = [length + more for length, more in zip(lengths, real.sum(1).tolist(), strict=True)]
        return lengths

    def extend(self, model: Transformer, input_ids: Tensor, real: Tensor, every: bool = False) -> Tensor:
        """Append new columns of the batch.

        Args:
            model: the decoder.
            input_ids: int64 [B, L].
            real: False at padding, [B, L]. A row's tokens follow each other in the cache, whatever stood between.
            every: return the states of every column instead of the last one alone.

        Returns:
            Final hidden states, [B, L or 1, hidden_size], 0 at padding.
        """
        if len(input_ids) != self.rows:
            raise SettingError(f"past_key_values must have the rows of input_ids, got {self.rows} for {len(input_ids)}")
        waiting, self._waiting = self._waiting, []
        for earlier in waiting:
            self._append(model, *earlier, False)
        self._seen += input_ids.shape[1]
        return self._append(model, input_ids, real, every)

    def _append(self, model: Transformer, input_ids: Tensor, real: Tensor, every: bool) -> Tensor:
        kept = self._with_room(input_ids.device, input_ids.shape[1])
        counts = real.sum(1).tolist()
        if input_ids.shape[1] == 1 and all(kept.host_lengths) and all(counts):
            return decode(model, input_ids[:, 0], kept)[:, None]
        columns = input_ids.shape[1] if every else 1
        hidden: Tensor | None = None
        for row, (ids, mask, count) in enumerate(zip(input_ids, real, counts, strict=True)):
            if not count:
                continue
            found = prefill(model, ids[mask], kept, row, every=every)
            if hidden is None:
                hidden = found.new_zeros(len(input_ids), columns, found.shape[-1])
            if every:
                hidden[row, mask] = found
            elif mask[-1]:
                hidden[row, 0] = found
        if hidden is None:
            raise SettingError("attention_mask must leave a token of the new columns, got none in any row")
        return hidden

    def _with_room(self, device: torch.device, columns: int) -> TransformerCache:
        """The cache with room for so many tokens more in every row."""
        if self.kept is None:
            capacity, mixed = max(self.capacity, columns), torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if mixed else self._dtype
            self.kept = TransformerCache.allocate(self._config, self.rows, capacity, device, dtype)
        needed = max(self.kept.host_lengths) + columns
        if needed > self.kept.capacity:
            self.kept = self.kept.grown(max(needed, 2 * self.kept.capacity))
        self.capacity = self.kept.capacity
        return self.kept


class _Documents(NamedTuple):
    """The documents of a batch, packed."""

    positions: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int32 [N + 1]
    max_seqlen: int
    one_a_row: bool


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
        # transformers ties the output layer, which must not have a parameter of its own name in both places
        self.model = Transformer(replace(TransformerConfig.from_dict(config.transformer), tie_embeddings=False))
        self.lm_head = self.model.lm_head
        del self.model.lm_head  # its name in a Hugging Face directory has no prefix
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """What a file lacks or a resized embedding adds starts as in a model that is trained from scratch."""
        path = next((path for path, part in self.model.named_modules() if part is module), None)
        for name, parameter in module.named_parameters(recurse=False):
            added = 0.0, parameter.shape[-1] ** -0.5  # an embedding or an output layer
            mean, deviation = added if path is None else self.model.first_values(f"{path}.{name}")
            init.normal_(parameter, mean, deviation) if deviation else init.constant_(parameter, mean)

    def get_input_embeddings(self) -> torch.nn.Module:
        """The embedding of tokens."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        """Take another embedding of tokens."""
        self.model.embed_tokens = cast("torch.nn.Embedding", value)

    def get_output_embeddings(self) -> torch.nn.Module:
        """The output layer."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        """Take another output layer."""
        self.lm_head = cast("torch.nn.Linear", new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> torch.nn.Module:
        """As `transformers` does it, in every place where the vocabulary's size is kept."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        size = len(self.model.embed_tokens.weight)
        self.config.transformer = {**self.config.transformer, "vocab_size": size}
        self.model.config = replace(self.model.config, vocab_size=size)
        return embedding

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As `transformers` does it, and what it finds this class by."""
        tied = bool(self.config.tie_word_embeddings)
        self.config.transformer = {**self.config.transformer, "tie_embeddings": tied}
        super().save_pretrained(save_directory, *args, **kwargs)
        write_remote_code(Path(save_directory))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NSACache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of a batch; each row is a document, packed without its padding, or several by `position_ids`.

        Args:
            input_ids: int64 [B, L].
            attention_mask: 0 at padding, on either side, else 1, [B, L]; with a cache it has earlier columns too.
            position_ids: positions that count up, [B, L] or [1, L]; where they restart at 0 another document begins.
            past_key_values: tokens before these, which are appended to it.
            labels: the tokens again, -100 where they are not scored, [B, L]; asks for the mean loss.
            use_cache: return the tokens as `past_key_values`; if not given, as the config says and outside of training.
                What is computed with such tokens has no gradient.
            logits_to_keep: of the last positions alone, or of these; 0 for all.
            kwargs: what else `transformers` hands over; `num_items_in_batch` counts for the loss.

        Raises:
            ValueError: something is asked for that the model does not have.
        """
        self._refuse(kwargs, position_ids)
        if input_ids is None:
            raise SettingError("input_ids must be given, got none")
        real = _real_tokens(input_ids, attention_mask, past_key_values)
        if past_key_values is None:
            documents = _documents(input_ids, real, position_ids)
            past_key_values = self._new_cache(input_ids, documents.one_a_row, use_cache)
            if past_key_values is not None and use_cache and not torch.is_grad_enabled():
                hidden = past_key_values.extend(self.model, input_ids, real, every=not _is_last(logits_to_keep))
            else:
                hidden = self._packed(input_ids, real, documents)
                if past_key_values is not None:
                    past_key_values.remember(input_ids, real)
        else:
            _check_cache(past_key_values)
            if position_ids is not None:
                _check_continuation(position_ids, real, past_key_values)
            hidden = past_key_values.extend(self.model, input_ids, real, every=not _is_last(logits_to_keep))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            settings = {name: kwargs[name] for name in _LOSS_SETTINGS if name in kwargs}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **settings)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        as_tuple = kwargs.get("return_dict", self.config.return_dict) is False
        return output.to_tuple() if as_tuple else output

    def _refuse(self, kwargs: dict[str, Any], position_ids: Tensor | None) -> None:
        """Raise ValueError where an argument would silently do nothing."""
        for name, reason in _NEVER.items():
            asked = kwargs.get(name, getattr(self.config, name, None))
            if asked is not None and asked is not False:
                raise SettingError(f"{name} must not be set: {reason}")
        known = {*_LOSS_SETTINGS, *_WITHOUT_EFFECT, *_NEVER}
        for name, value in kwargs.items():
            if value is None or name in known or (name in _SAID_TWICE and position_ids is not None):
                continue
            hint = ": give position_ids, which restart at 0 with each document" if name in _SAID_TWICE else ""
            raise SettingError(f"{name} must not be set, the model does not know it{hint}")

    def _new_cache(self, input_ids: Tensor, one_a_row: bool, use_cache: bool | None) -> NSACache | None:
        """A cache to return, if it is wanted and can be."""
        several = self._devices() > 1
        if use_cache and not one_a_row:
            raise SettingError("use_cache must be False where position_ids begin several documents in a row, got True")
        if use_cache and several:
            raise SettingError("use_cache must be False where device_map spreads the layers over devices, got True")
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        return NSACache(self, len(input_ids)) if wanted and one_a_row and not several else None

    def _devices(self) -> int:
        """On how many devices layers are computed; what is offloaded is brought to the one that the others have."""
        places = getattr(self, "hf_device_map", {}).values()
        return len({str(place) for place in places} - {"cpu", "disk"})

    def _packed(self, input_ids: Tensor, real: Tensor, documents: _Documents) -> Tensor:
        """Final hidden states, [B, L, hidden_size], 0 at padding."""
        found = self.model(input_ids[real], documents.positions, documents.cu_seqlens, documents.max_seqlen).hidden
        return found.new_zeros(*input_ids.shape, found.shape[-1]).masked_scatter(real.unsqueeze(-1), found)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: NSACache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache does not have, all of them at every step where there is none."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if attention_mask is not None and not seen and not attention_mask[:, -1].all():
            raise SettingError("attention_mask must be 0 on the left alone to generate, got padding on the right")
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "logits_to_keep": 1}
        inputs |= {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        inputs |= {name: kwargs[name] for name in _NEVER if kwargs.get(name)}
        if position_ids is not None and (past_key_values is None or not seen):  # those of later steps count on
            inputs["position_ids"] = position_ids[:, seen:]
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
        steady = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) and self._devices() < 2
        if steady and generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            rows = batch_size * generation_config.num_return_sequences
            model_kwargs["past_key_values"] = NSACache(self, rows, max(max_cache_length, 1))


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None, cache: NSACache | None) -> Tensor:
    """False at padding, [B, L]."""
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    rows, columns = input_ids.shape
    seen = cache.get_seq_length() if isinstance(cache, NSACache) else 0
    shape = tuple(getattr(attention_mask, "shape", ()))
    if shape not in ((rows, columns), (rows, seen + columns)):
        raise SettingError(
            f"attention_mask must be [B, L], 0 at padding, {(rows, seen + columns)} here, got "
            f"{shape or type(attention_mask).__name__}"
        )
    real = attention_mask[:, -columns:].to(input_ids.device).bool()
    begun = real & ~torch.nn.functional.pad(real, (1, -1))
    if (begun.sum(1) > 1).any():
        raise SettingError("attention_mask must be 0 at the ends of a row alone, got 0 between its tokens")
    return real


def _documents(input_ids: Tensor, real: Tensor, position_ids: Tensor | None) -> _Documents:
    """Where documents begin among the tokens that are not padding."""
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)[real]  # [T]
    begins = rows != torch.nn.functional.pad(rows, (1, -1), value=-1)
    one_a_row = True
    if position_ids is not None:
        given = _of_each_row(position_ids, input_ids)[real]
        again = (given != torch.nn.functional.pad(given, (1, -1)) + 1) & ~begins
        if (given[again] != 0).any():
            raise SettingError("position_ids must count up, or restart at 0 where another document begins")
        one_a_row, begins = not bool(again.any()), begins | again
    first = begins.nonzero()[:, 0]  # [N]
    cu_seqlens = torch.nn.functional.pad(first, (0, 1), value=len(rows))
    lengths = cu_seqlens.diff()
    positions = torch.arange(len(rows), device=rows.device) - first.repeat_interleave(lengths)
    return _Documents(positions, cu_seqlens.int(), int(lengths.max()), one_a_row)


def _of_each_row(position_ids: Tensor, input_ids: Tensor) -> Tensor:
    """Positions of the columns of `input_ids`."""
    rows, columns = input_ids.shape
    if position_ids.ndim != 2 or len(position_ids) not in (1, rows) or position_ids.shape[1] != columns:
        raise SettingError(f"position_ids must be [B, L], {(rows, columns)} here, got {tuple(position_ids.shape)}")
    return position_ids.to(input_ids.device).expand(rows, columns)


def _check_cache(cache: Any) -> None:
    if not isinstance(cache, NSACache):
        raise SettingError(
            f"past_key_values must be an NSACache, such as use_cache=True returns, got {type(cache).__name__}"
        )


def _check_continuation(position_ids: Tensor, real: Tensor, cache: NSACache) -> None:
    """Refuse positions that do not go on where the cache ends: a row in it is one document."""
    given = _of_each_row(position_ids, real)
    for row, length in enumerate(cache.row_lengths()):
        own = given[row][real[row]].tolist()
        if own and (own[0] not in (length, cache.get_seq_length()) or own != list(range(own[0], own[0] + len(own)))):
            raise SettingError(
                f"position_ids must go on behind the {length} tokens of past_key_values, got {own[0]} to {own[-1]}"
            )


def _is_last(logits_to_keep: int | Tensor) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 1


AutoConfig.register(MODEL_TYPE, NSAConfig, exist_ok=True)
AutoModelForCausalLM.register(NSAConfig, NSAForCausalLM, exist_ok=True)
