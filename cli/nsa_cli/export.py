"""`nsa export`: a checkpoint as a Hugging Face directory."""

import sys
from pathlib import Path
from typing import Literal

import torch

from nsa_cli.function_command import run_function
from nsa_lightning.checkpoint.directory import MODEL_TYPE
from nsa_lightning.checkpoint.export import export

_DTYPES = {"keep": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_model(
    checkpoint: str,
    output: str,
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep",
    tokenizer: str | None = None,
) -> int:
    """Write a checkpoint as a directory that `AutoModelForCausalLM.from_pretrained` loads.

    A model whose layers are all `full` becomes a plain Llama, Qwen2 or Qwen3, one of `sliding` layers a Mistral. Any
    other needs this package beside transformers, and `trust_remote_code=True` to find it.

    Args:
        checkpoint: checkpoint of nsa fit, one file or a sharded directory; a run's directory, for the last one in it;
            or a directory of nsa convert.
        output: directory to write; must not exist.
        dtype: of the weights; nsa fit keeps float32.
        tokenizer: directory or tokenizer.json to copy, with the files beside it; left out, the one that belongs to the
            checkpoint.

    Returns:
        0.

    Raises:
        ValueError: there is no such checkpoint, or the output cannot be written.
    """
    path = Path(tokenizer) if tokenizer is not None else None
    written = export(Path(checkpoint), Path(output), _DTYPES[dtype], path)
    name = str(written.dtype).removeprefix("torch.")
    print(f"{output}: {written.model_type}, {written.num_weights / 1e6:.1f} M weights in {name}")
    print(f"tokenizer    {', '.join(written.tokenizer_files) or 'none: set --tokenizer to have one'}")
    if written.remark is not None:
        print(f"note         {written.remark}")
    code = ", trust_remote_code=True" if written.model_type == MODEL_TYPE else ""
    print(f'load it      AutoModelForCausalLM.from_pretrained("{output}"{code})')
    return 0


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    return run_function("export", export_model, sys.argv[2:] or ["--help"], paths=("checkpoint", "output", "tokenizer"))
