"""One token of each sequence through a whole model of a config, NSA and full attention, and the prefill of a prompt.

The weights are random. No prompt stands behind the cache: it is filled with normal numbers and its lengths are set. A
step is that of `nsa generate` without the sampling: embedding, layers, output layer. Its time is the mean over
`compress_stride` steps, in which every sequence completes one compression block; they begin at different positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
import yaml
from nsa_kernels.errors import SettingError
from torch import Tensor

from nsa_lightning.benchmark.decode_layer import DecodeBench, missing_memory
from nsa_lightning.benchmark.decode_records import DecodeCase, DecodeRecord
from nsa_lightning.benchmark.timing import release_memory, within_memory
from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.model.cached import Cache, prefill
from nsa_lightning.model.config import TransformerConfig
from nsa_lightning.model.initialization import materialise
from nsa_lightning.model.transformer import Transformer

FULL = "full"


def read_transformer_config(path: Path) -> TransformerConfig:
    """The model of a config of `nsa fit`, its vocabulary that of the tokenizer where `transformer` has none.

    Raises:
        ValueError: it is no such config, or a setting of the model is wrong.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TransformerConfig, "model.transformer")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        transformer = dict(settings["model"]["transformer"])
        vocabulary = ((settings.get("data") or {}).get("tokenizer") or {}).get("vocab_size")
        if vocabulary is not None:
            transformer.setdefault("vocab_size", vocabulary)
        parsed = parser.parse_object({"model": {"transformer": transformer}})
        config = parser.instantiate_classes(parsed).model.transformer
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise SettingError(f"config must be a config of nsa fit with model.transformer, got {path}: {error}") from error
    except ArgumentError as error:
        raise SettingError(f"config {path}: {error}") from error
    return cast("TransformerConfig", config)


def measure_model(
    bench: DecodeBench,
    config: TransformerConfig,
    cases: list[DecodeCase],
    rivals: bool,
    tell: Callable[[str], None],
) -> Iterator[DecodeRecord]:
    """Time every case with the config's attention, then if wanted with full attention; one model at a time."""
    is_full = set(config.attention) == {FULL}
    for choice in [config, replace(config, attention=[FULL])] if rivals and not is_full else [config]:
        release_memory()
        model, reason = within_memory(partial(random_model, choice, bench.dtype, bench.clock.device))
        for case in cases:
            method = ",".join(choice.attention)
            empty = DecodeRecord(case=case, method=method, full=is_full or choice is not config)
            tell(f"{case.words}, {method}")
            if model is None:
                yield replace(empty, reason=f"weights: {reason}")
            elif case.kind == "prefill":
                yield _measure_prefill(bench, model, empty)
            else:
                yield _measure_steps(bench, model, empty)
        del model


def random_model(config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> Transformer:
    """A model with its first weights, as `nsa generate` decodes with it."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype).requires_grad_(False)
    materialise(model, device)
    model.init_weights(seed=0)
    model.join_projections()
    return model.eval()


def _measure_steps(bench: DecodeBench, model: Transformer, record: DecodeRecord) -> DecodeRecord:
    """Mean time of a step, launched by Python and as CUDA graphs."""
    case, stride = record.case, model.config.nsa.compress_stride
    reason = _missing_memory(bench, model, case.batch_size, case.context + stride)
    if reason is None:
        ms, reason = within_memory(partial(_step_ms, bench, model, case, cuda_graphs=False))
        record = replace(record, eager_ms=ms)
    if reason is None and bench.clock.device.type == "cuda":
        release_memory()
        ms, reason = within_memory(partial(_step_ms, bench, model, case, cuda_graphs=True))
        record = replace(record, graph_ms=ms)
    return replace(record, reason=reason)


def _step_ms(bench: DecodeBench, model: Transformer, case: DecodeCase, cuda_graphs: bool) -> float:
    stride = model.config.nsa.compress_stride
    decoder = Decoder(model, case.batch_size, case.context + stride, cuda_graphs)
    steps = steps_at(decoder, case.context)
    return bench.clock.measure(steps).ms / stride


@torch.inference_mode()
def steps_at(decoder: Decoder, context: int) -> Callable[[], Tensor]:
    """`compress_stride` steps of sequences with about `context` tokens, from the same lengths in every call."""
    cache, stride = decoder.cache, decoder.model.config.nsa.compress_stride
    for numbers in cache.tensors():
        numbers.normal_()
    lengths = [max(context - row % stride, 0) for row in range(decoder.batch_size)]
    start, tokens = torch.tensor(lengths, dtype=torch.int32, device=cache.lengths.device), [0] * decoder.batch_size

    def steps() -> Tensor:
        with torch.inference_mode():
            cache.lengths.copy_(start)
            cache.host_lengths = list(lengths)
            for _ in range(stride):
                logits = decoder.step(tokens)
        return logits

    return steps


def _measure_prefill(bench: DecodeBench, model: Transformer, record: DecodeRecord) -> DecodeRecord:
    """Time of a prompt from an empty cache to the hidden states of its last token; two before it warm up."""
    case, device = record.case, bench.clock.device
    reason = _missing_memory(bench, model, case.batch_size, case.context)
    if reason is not None:
        return replace(record, reason=reason)
    prompt = torch.randint(model.config.vocab_size, (case.context,), device=device)

    def prefilled() -> float:
        cache = Cache.allocate(model.config, case.batch_size, case.context, device, bench.dtype)
        clock = bench.clock._replace(repetitions=1)
        return clock.measure(lambda: prefill(model, prompt, cache, 0), before=lambda: cache.reset(0)).ms

    ms, reason = within_memory(prefilled)
    return replace(record, eager_ms=ms, reason=reason)


def _missing_memory(bench: DecodeBench, model: Transformer, batch_size: int, capacity: int) -> str | None:
    """Why the cache does not fit beside the weights."""
    return missing_memory(Cache.bytes_needed(model.config, batch_size, capacity, bench.dtype), bench.clock.device)
