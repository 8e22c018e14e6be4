"""`nsa generate`: text from a trained model."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from nsa_kernels.errors import SettingError

from nsa_cli.function_command import run_function
from nsa_lightning.checkpoint.convert import RopeChange
from nsa_lightning.generation.answers import printed_answers, written_answers
from nsa_lightning.generation.device import DtypeName, choose_dtype, use_device
from nsa_lightning.generation.generate import Generation, StopConfig
from nsa_lightning.generation.prompts import read_prompts
from nsa_lightning.generation.sampling import Sampler, SamplingConfig
from nsa_lightning.generation.text_model import open_text_model

_PATHS = ("model", "prompt_file", "output", "tokenizer")


def generate_text(
    model: str,
    prompt: str | None = None,
    prompt_file: list[str] = [],  # noqa: B006 (not changed)
    output: str | None = None,
    tokenizer: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 256,
    stop: list[str] = [],  # noqa: B006 (not changed)
    batch_size: int = 8,
    device: str = "auto",
    dtype: DtypeName = "auto",
    cuda_graphs: bool = True,
    rope: RopeChange = RopeChange(),  # noqa: B008 (frozen)
    **sampling: Any,
) -> int:
    """Continue prompts with a trained model, or answer them with `--chat`.

    One answer is printed as it comes; several are printed in the order of their prompts, or written to `--output`.
    Tokens a second are told on stderr at the end. Ctrl-C keeps what there is.

    Args:
        model: checkpoint of nsa fit, one file or a sharded directory; a run's directory, for the last one in it; a
            directory of nsa convert or nsa export; or a dense Hugging Face directory (Llama, Mistral, Qwen, SmolLM).
        prompt: text to continue; names of special tokens in it stand for them. Without prompt and prompt_file, the text
            that is piped in.
        prompt_file: files with a prompt each, or .jsonl files with one in each line's `prompt`.
        output: .jsonl file to write instead of printing, a line a prompt: prompt, answer, tokens, finish (end, stop or
            length); must not exist.
        tokenizer: tokenizer.json or its directory; left out, the one that belongs to the model.
        chat: put each prompt as a user's message into the tokenizer's chat template.
        max_new_tokens: longest answer, tokens.
        stop: strings that end an answer and are not part of it, taken as they are typed, special tokens too; the
            model's own end-of-text tokens always end it.
        batch_size: prompts that are continued at once; the others take the place of those that have ended.
        device: auto (a GPU if there is one), cpu, cuda or cuda:1.
        dtype: of weights and cache; auto is bfloat16 on a GPU and float32 on a CPU.
        cuda_graphs: replay the decoding step as a CUDA graph; on a GPU only.
        rope: rotary embedding beyond the context that the model is made for.
        sampling: how the next token is drawn.

    Returns:
        0.

    Raises:
        ValueError: a setting is out of range, the model or a prompt cannot be read, or the memory does not suffice.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    drawing = SamplingConfig(**sampling)
    stops = StopConfig(max_new_tokens=max_new_tokens, stop=stop)
    if batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, got {batch_size}")
    place = use_device(device)
    prompts = read_prompts(prompt, prompt_file, sys.stdin.buffer)
    opened = open_text_model(Path(model), Path(tokenizer) if tokenizer is not None else None, rope)
    tokens = opened.encode(prompts, chat)
    rows, capacity = min(batch_size, len(prompts)), max(map(len, tokens)) + max_new_tokens
    with written_answers(prompts, Path(output)) if output is not None else printed_answers(prompts, sys.stdout) as add:
        decoder = opened.decoder(rows, capacity, place, choose_dtype(dtype, place), cuda_graphs)
        sampler = Sampler(drawing, rows, opened.config.vocab_size, place)
        for remark in (opened.trained.remark, opened.remark(tokens, max_new_tokens)):
            if remark is not None:
                print(f"nsa generate: note: {remark}", file=sys.stderr)
        generation = Generation(decoder, sampler, opened.tokenizer, opened.end_tokens, stops)
        try:
            with tqdm(total=len(prompts), desc="generate", unit="answer", disable=None if output else True) as bar:
                for piece in generation.run(tokens):
                    add(piece)
                    bar.update(piece.finish is not None)
        finally:
            print(generation.speed, file=sys.stderr)
    return 0


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    try:
        return run_function("generate", generate_text, sys.argv[2:] or ["--help"], paths=_PATHS, verbatim=("stop",))
    except BrokenPipeError:  # who reads has enough; nothing is left for the interpreter to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
