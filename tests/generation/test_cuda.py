"""Decoding on a GPU: the step as a CUDA graph."""

import pytest
import torch

from nsa_lightning.generation.decoder import Decoder
from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.model.config import NSALayerConfig

pytestmark = pytest.mark.gpu

NSA = NSALayerConfig(
    kv_sharing="separate", branch_start="independent", select_block_size=32, num_selected_blocks=8, window_size=64
)
CONFIG = TransformerConfig(
    vocab_size=512, hidden_size=128, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=64, intermediate_size=256,
    attention=["nsa", "full", "sliding"], sliding_window=64, nsa=NSA,
)  # fmt: skip


def greedy(decoder: Decoder, prompts: list[torch.Tensor], steps: int) -> list[list[int]]:
    """The likeliest tokens of two answers at a time; half way the first row ends and takes the last prompt."""
    tokens = [int(decoder.begin(row, prompt).argmax()) for row, prompt in enumerate(prompts[:2])]
    answers = [tokens]
    for step in range(steps):
        tokens = decoder.step(tokens).argmax(-1).tolist()
        if step == steps // 2:
            decoder.end(0)
            tokens[0] = int(decoder.begin(0, prompts[2]).argmax())
        answers.append(tokens)
    return answers


def test_greedy_decoding_is_the_same_with_and_without_cuda_graphs():
    torch.manual_seed(0)
    model = Transformer(CONFIG).cuda().requires_grad_(False)
    model.join_projections()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(512, (length,), generator=generator) for length in (300, 7, 29)]
    plain, graphs = (greedy(Decoder(model, 2, 400, cuda_graphs), prompts, 80) for cuda_graphs in (False, True))
    assert graphs == plain
    assert len({token for tokens in plain for token in tokens}) > 10
