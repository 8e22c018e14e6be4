import dataclasses

import pytest
import torch
from nsa_kernels import native_sparse_attention
from support.packings import cu_seqlens

from nsa_lightning.model import Transformer, TransformerConfig
from nsa_lightning.model.attention.nsa import NSAttention
from nsa_lightning.model.config import NSALayerConfig
from nsa_lightning.model.rope import RopeConfig

NSA = NSALayerConfig(
    kv_sharing="separate",
    branch_start="independent",
    compress_block_size=4,
    compress_stride=2,
    select_block_size=8,
    num_selected_blocks=4,
    window_size=6,
)
CONFIG = TransformerConfig(
    vocab_size=50, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=40, nsa=NSA
)
LENGTHS = [1, 45, 3, 20]

VARIANTS = {
    "nsa": {},
    "full": {"attention": ["full"]},
    "sliding": {"attention": ["sliding"], "sliding_window": 5},
    "mixed": {"attention": ["nsa", "full"]},
    "qwen3": {"qk_norm": True, "head_dim": 8},
    "qwen2": {"qkv_bias": True},
    "untied": {"tie_embeddings": False},
    "value_head_dim": {"value_head_dim": 4},
    "shared": {"nsa": dataclasses.replace(NSA, kv_sharing="shared")},
    "mean": {"nsa": dataclasses.replace(NSA, compression="mean")},
    "linear": {"nsa": dataclasses.replace(NSA, compression="linear")},
    "rope_before": {"nsa": dataclasses.replace(NSA, compress_rope="before")},
    "rope_none": {"nsa": dataclasses.replace(NSA, compress_rope="none")},
    "gate_mlp": {"nsa": dataclasses.replace(NSA, gate_hidden_size=16)},
    "yarn": {"rope": RopeConfig(scaling="yarn", factor=2.0, original_max_seq_len=32)},
}


def build(**changes):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, **changes)).double()
    for parameter in model.parameters():  # away from the zeros that some parts start at
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model


def packed(lengths, seed=0):
    tokens = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return tokens, positions, cu_seqlens(lengths), max(lengths)


@pytest.mark.parametrize("name", VARIANTS)
def test_packing_is_invisible_in_outputs_and_gradients(name):
    model = build(**VARIANTS[name])
    tokens, positions, offsets, longest = packed(LENGTHS)
    hidden = model(tokens, positions, offsets, longest).hidden
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    alone = []
    for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        length = end - start
        document = model(tokens[start:end], positions[start:end], cu_seqlens([length]), length).hidden
        (document * weights[start:end]).sum().backward()
        alone.append(document)
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-8, atol=1e-8)
    for part, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[part].grad, rtol=1e-7, atol=1e-7)
    assert hidden.std() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_the_future_is_unseen(name):
    model = build(**VARIANTS[name])
    tokens, positions, offsets, longest = packed([40])
    changed = tokens.clone()
    changed[30] = (changed[30] + 1) % 50
    before = model(tokens, positions, offsets, longest).hidden
    after = model(changed, positions, offsets, longest).hidden
    assert torch.equal(before[:30], after[:30])
    assert not torch.allclose(before[30:], after[30:])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_learns(name):
    model = build(**VARIANTS[name])
    model(*packed(LENGTHS)).hidden.square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0}
    assert without <= {"lm_head.weight"}  # the loss multiplies with it, not the decoder


def test_nsa_with_only_the_selected_gate_open_is_full_attention_up_to_the_selected_tokens():
    """The converter's invariant: the same projections, the same function."""
    sparse = build(nsa=dataclasses.replace(NSA, kv_sharing="shared", compression="mean"))
    dense = build(attention=["full"])
    dense.load_state_dict(sparse.state_dict(), strict=False)
    for layer in sparse.layers:
        torch.nn.init.zeros_(layer.self_attn.branch_gate.weight)
        layer.self_attn.branch_gate.bias.data.copy_(torch.tensor([-1e9, 1e9, -1e9]).repeat(4))
    inside, beyond = packed([NSA.selected_tokens]), packed([2 * NSA.selected_tokens])
    torch.testing.assert_close(sparse(*inside).hidden, dense(*inside).hidden, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(sparse(*beyond).hidden, dense(*beyond).hidden)


def test_backends_agree_in_the_whole_decoder():
    eager, reference = build(), build(nsa=dataclasses.replace(NSA, backend="reference"))
    inputs = packed(LENGTHS)
    torch.testing.assert_close(eager(*inputs).hidden, reference(*inputs).hidden, rtol=1e-9, atol=1e-9)


def test_autocast_hands_the_operator_one_dtype(monkeypatch):
    """The kernels take no mixture, and a norm of queries and keys is computed in float32."""
    seen = []

    def spy(q, k, v, gates, *args, **options):
        names = ("sliding_k", "sliding_v", "compress_k", "compress_v")
        seen.append({q.dtype, k.dtype, v.dtype, *(options[name].dtype for name in names)})
        return native_sparse_attention(q, k, v, gates, *args, **options)

    monkeypatch.setattr("nsa_lightning.model.attention.nsa.native_sparse_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = build(qk_norm=True).float()(*packed(LENGTHS)).hidden
    assert seen
    assert all(dtypes == {torch.bfloat16} for dtypes in seen)
    assert hidden.isfinite().all()


def test_attention_names_repeat_over_the_layers():
    model = build(num_layers=4, attention=["nsa", "full"])
    kinds = ["nsa" if isinstance(layer.self_attn, NSAttention) else "full" for layer in model.layers]
    assert kinds == ["nsa", "full", "nsa", "full"]


def test_only_nsa_layers_are_watched_and_only_when_asked():
    model = build(num_layers=4, attention=["nsa", "full"])
    assert model(*packed(LENGTHS)).statistics == {}
    statistics = model(*packed(LENGTHS), watch=True).statistics
    assert sorted(statistics) == [0, 2]
    assert statistics[0].num_tokens == sum(LENGTHS)


def test_tied_embeddings_are_one_parameter():
    model = build()
    assert model.output_embedding is model.embed_tokens.weight
    assert build(tie_embeddings=False).output_embedding is not model.embed_tokens.weight


def test_dense_parameters_carry_hugging_face_names():
    names = set(build(attention=["full"], qk_norm=True, qkv_bias=True).state_dict())
    layer = "layers.0."
    assert {
        "embed_tokens.weight",
        "norm.weight",
        layer + "input_layernorm.weight",
        layer + "post_attention_layernorm.weight",
        *(layer + f"self_attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")),
        layer + "self_attn.o_proj.weight",
        layer + "self_attn.q_norm.weight",
        layer + "self_attn.k_norm.weight",
        *(layer + f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    } <= names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 4}, "num_heads must be a multiple of num_kv_heads, got 6 and 4"),
        ({"hidden_size": 50}, "hidden_size must be a multiple of num_heads where head_dim is not set, got 50 and 4"),
        ({"head_dim": 7}, "head_dim must be even for rotary embedding, got 7"),
        ({"attention": ["nsa", "nsa", "full"]}, "attention must have a length that divides num_layers, got 3 names"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"norm_eps": -1.0}, "norm_eps must be at least 0, got -1.0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"max_seq_len": 3}, r"max_seq_len \(data.seq_len\) must be at least nsa.compress_block_size, got 3 and 4"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_hidden_sizes_of_learned_parts_must_be_positive():
    with pytest.raises(ValueError, match="gate_hidden_size must be at least 1, got 0"):
        dataclasses.replace(NSA, gate_hidden_size=0)
