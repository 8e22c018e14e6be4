"""`nsa convert`: a dense Hugging Face model as an NSA model, ready to be trained on."""

import shlex
import sys
from pathlib import Path

from nsa_cli.function_command import run_function
from nsa_lightning.checkpoint.convert import CONVERTED, OPEN, Conversion, RopeChange, convert
from nsa_lightning.model.config import NSALayerConfig


def convert_model(
    source: str,
    output: str,
    attention: list[str] = ["nsa"],  # noqa: B006 (not changed)
    nsa: NSALayerConfig = CONVERTED,
    rope: RopeChange = RopeChange(),  # noqa: B008 (frozen)
    seq_len: int = 16384,
    sample: str | None = None,
    sample_tokens: int = 2048,
    gate_bias: float = OPEN,
) -> int:
    """Make an NSA model of a dense one: Llama 2/3, Mistral, Qwen2/2.5, Qwen3, SmolLM.

    Writes the weights, the tokenizer and `continue.yaml`, from which `nsa fit` trains on.

    Args:
        source: Hugging Face directory with config.json and safetensors files, sharded or not.
        output: directory to write; must not exist.
        attention: attention by layer, repeated: nsa, full or sliding; [nsa, nsa, full] leaves every third dense.
        nsa: geometry and learned parts of the NSA layers.
        rope: rotary embedding of the longer context.
        seq_len: tokens in a sequence of the continued training.
        sample: text file on which the difference from the source is measured; left out, a module of Python's own.
        sample_tokens: how many of its tokens; 0 measures nothing.
        gate_bias: what the selected branch's gates have before their sigmoid, the other two its negative; at 40 the
            selected branch is alone.

    Returns:
        0.

    Raises:
        ValueError: the source cannot be converted, the settings do not fit it, or the output cannot be written.
    """
    text = Path(sample) if sample is not None else None
    result = convert(Path(source), Path(output), attention, nsa, rope, seq_len, text, sample_tokens, gate_bias)
    _report(result, output)
    return 0


def _report(result: Conversion, output: str) -> None:
    layers = result.config.layer_attention
    print(f"layers       {', '.join(f'{layers.count(kind)} {kind}' for kind in sorted(set(layers)))}")
    print(f"copied       {result.copied / 1e6:.1f} M weights, and {result.repeated / 1e6:.1f} M again for the branches")
    print(f"new          {result.new / 1e6:.1f} M weights: gates and block summaries")
    print(f"tokenizer    {', '.join(result.tokenizer_files) or 'none'}")
    if result.difference is not None:
        losses, by_position, tokens, text = result.difference
        print(f"loss         {_words(losses)} nats a token on {tokens} tokens of {text}")
        for start, found in by_position.items():
            print(f"  from {start:<8}{_words(found)}")
    for remark in result.remarks:
        print(f"note         {remark}")
    config = shlex.quote(str(Path(output, "continue.yaml")))
    print(f"train on     nsa fit --config {config} --data.sources my_texts/")


def _words(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())


def run() -> int:
    """Run the command of `sys.argv`; returns the exit status, 2 for a mistake in the settings."""
    return run_function("convert", convert_model, sys.argv[2:] or ["--help"], paths=("source", "output", "sample"))
