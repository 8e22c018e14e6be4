"""The decoder on a GPU: fused attention, bf16 training, CUDA graphs, and no wait for the device inside a step."""

import dataclasses

import pytest
import torch
from support.gpu import refusing_to_wait
from support.packings import cu_seqlens

from nsa_lightning.generation.cuda_graphs import capture
from nsa_lightning.model import Cache, Transformer, TransformerConfig
from nsa_lightning.model.cached import decode, prefill
from nsa_lightning.model.config import NSALayerConfig
from nsa_lightning.model.fused_attention import packed_causal_attention
from nsa_lightning.model.loss import summed_cross_entropy

pytestmark = pytest.mark.gpu

LENGTHS = [1, 700, 33, 290]
CONFIG = TransformerConfig(
    vocab_size=512, hidden_size=128, num_layers=2, num_heads=8, num_kv_heads=2, head_dim=64, intermediate_size=256,
    nsa=NSALayerConfig(kv_sharing="separate", branch_start="independent",
                       select_block_size=32, num_selected_blocks=8, window_size=64),
)  # fmt: skip


def packed_batch():
    tokens = torch.randint(0, 512, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).cuda()
    return tokens, positions, cu_seqlens(LENGTHS).cuda(), max(LENGTHS)


@pytest.mark.parametrize("window_size", [None, 64])
@pytest.mark.parametrize(("heads", "head_dim"), [((8, 2), 64), ((6, 6), 128)])
def test_varlen_attention_equals_attention_document_by_document(heads, head_dim, window_size):
    H, H_kv = heads
    inputs = [torch.randn(sum(LENGTHS), h, head_dim, device="cuda").bfloat16() for h in (H, H_kv, H_kv)]
    offsets = cu_seqlens(LENGTHS).cuda()
    fused = packed_causal_attention(*inputs, offsets, max(LENGTHS), window_size)
    exact = packed_causal_attention(*(x.double() for x in inputs), offsets, max(LENGTHS), window_size)
    assert (fused.double() - exact).norm() / exact.norm() < 5e-3
    assert fused.dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ["nsa", "full", "sliding"])
def test_a_bf16_step_is_close_to_float64_and_never_waits_for_the_device(attention):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, attention=[attention], sliding_window=64)).cuda()
    batch = packed_batch()

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            hidden = model(*batch).hidden
        loss = summed_cross_entropy(hidden, model.output_embedding, batch[0], -100)
        loss.backward()
        return loss

    step()
    model.zero_grad()
    with refusing_to_wait():
        loss = step()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.double().zero_grad()
    exact = summed_cross_entropy(model(*batch).hidden, model.output_embedding, batch[0], -100)
    exact.backward()
    assert abs(loss.item() - exact.item()) / exact.item() < 5e-3
    error = sum((gradients[name] - p.grad).norm() ** 2 for name, p in model.named_parameters() if name in gradients)
    scale = sum(p.grad.norm() ** 2 for name, p in model.named_parameters() if name in gradients)
    assert (error / scale).sqrt() < 0.1
    assert len(gradients) >= 20


def test_compiled_blocks_equal_the_plain_ones():
    torch.manual_seed(0)
    model = Transformer(CONFIG).cuda()
    plain = model(*packed_batch()).hidden
    for block in model.layers:
        block.compile()
    torch.testing.assert_close(model(*packed_batch()).hidden, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["nsa", "full", "sliding"])
def test_prompts_and_replayed_steps_equal_the_whole_document_and_never_wait_for_the_device(attention):
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, attention=[attention], sliding_window=64)
    model = Transformer(config).cuda().bfloat16().requires_grad_(False)
    document = packed_batch()[0][:700]
    exact = model.double()(document, torch.arange(700).cuda(), cu_seqlens([700]).cuda(), 700).hidden
    model.bfloat16()
    cache = Cache.allocate(config, 2, 700, "cuda", torch.bfloat16)
    tokens = torch.zeros(2, dtype=torch.int64, device="cuda")
    graph = capture(lambda: decode(model, tokens, cache))
    lengths, hidden = [660, 5], []
    with refusing_to_wait():
        for row, length in enumerate(lengths):
            cache.reset(row)
            prefill(model, document[:length], cache, row, chunk_size=256)
        for step in range(40):
            tokens.copy_(torch.stack([document[length + step] for length in lengths]))
            cache.count_step()
            hidden.append(graph.replay().clone())
    expected = torch.stack([exact[length : length + 40] for length in lengths], dim=1)
    assert (torch.stack(hidden).double() - expected).norm() / expected.norm() < 0.05
    assert cache.lengths.tolist() == cache.host_lengths == [700, 45]
