"""The cache against the forward pass on whole documents, at every position."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packings import cu_seqlens

from nsa_lightning.model import Cache, Transformer, TransformerConfig
from nsa_lightning.model.cached import decode, prefill
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
    vocab_size=50, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=40, sliding_window=5,
    attention=["nsa", "full", "sliding"], nsa=NSA,
)  # fmt: skip
REACH = NSA.selected_tokens

VARIANTS = {
    "mixed": {},
    "sliding": {"attention": ["sliding"]},
    "shared_rope_before": {"nsa": dataclasses.replace(NSA, kv_sharing="shared", compress_rope="before")},
    "shared_linear": {"nsa": dataclasses.replace(NSA, kv_sharing="shared", compression="linear")},
    "mean_rope_none": {"nsa": dataclasses.replace(NSA, compression="mean", compress_rope="none"), "attention": ["nsa"]},
    "linear_rope_before": {"nsa": dataclasses.replace(NSA, compression="linear", compress_rope="before")},
    "no_overlap": {"nsa": dataclasses.replace(NSA, compress_stride=4)},
    "wide_summary": {"nsa": dataclasses.replace(NSA, compress_block_size=16, window_size=1, gate_hidden_size=8)},
    "yarn": {"rope": RopeConfig(scaling="yarn", factor=2.0, original_max_seq_len=32)},
    "qwen": {"qk_norm": True, "qkv_bias": True, "value_head_dim": 4},
}


def build(**changes):
    torch.manual_seed(0)
    model = Transformer(dataclasses.replace(CONFIG, **changes)).double()
    for parameter in model.parameters():  # away from the zeros that some parts start at
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    return model.requires_grad_(False)


def allocate(model, batch_size=1, capacity=2 * REACH + 10):
    return Cache.allocate(model.config, batch_size, capacity, dtype=torch.float64)


def text(length, seed=0):
    return torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(seed))


def whole(model, tokens):
    """Hidden states at every position without a cache."""
    return model(tokens, torch.arange(len(tokens)), cu_seqlens([len(tokens)]), len(tokens)).hidden


def decoded(model, cache, tokens):
    """Hidden states of the single sequence's next tokens, one by one."""
    return torch.stack([decode(model, token[None], cache)[0] for token in tokens])


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", VARIANTS)
def test_token_by_token_equals_the_whole_document(name):
    model, tokens = build(**VARIANTS[name]), text(2 * REACH + 5)
    assert_close(decoded(model, allocate(model), tokens), whole(model, tokens))


@pytest.mark.parametrize("name", ["mixed", "shared_linear", "wide_summary", "qwen"])
def test_joined_projections_change_no_weight_and_no_result(name):
    model, tokens = build(**VARIANTS[name]), text(REACH + 5)
    expected, weights = whole(model, tokens), {name: weight.clone() for name, weight in model.state_dict().items()}
    memory = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    model.join_projections()
    model.join_projections()
    cache = allocate(model)
    assert_close(prefill(model, tokens[:-5], cache, 0), expected[-6])
    assert_close(decoded(model, cache, tokens[-5:]), expected[-5:])
    assert_close(whole(model, tokens), expected)
    assert all(torch.equal(weight, weights.pop(name)) for name, weight in model.state_dict().items())
    assert not weights
    joint = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    assert len(joint) <= len(memory) - 3 * len(model.layers)  # they share memory now


def replaced(model, other):
    """Weights and biases, one by one, by what comes from outside: `other` by name."""
    for name, parameter in model.named_parameters():
        parameter.data = other[name].clone()
    return model


def updated(model, other):
    """Every weight and bias by an optimizer."""
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for name, parameter in model.named_parameters():
        parameter.grad = parameter.detach() - other[name]
    optimizer.step()
    return model.requires_grad_(False)


def read(model, other, **options):
    model.load_state_dict(other, **options)
    return model


CHANGES = {
    "read": read,
    "assigned": lambda model, other: read(model, other, assign=True),
    "copied and read": lambda model, other: read(copy.deepcopy(model), other),
    "pickled and read": lambda model, other: read(pickle.loads(pickle.dumps(model)), other),
    "narrowed, widened and read": lambda model, other: read(model.half().double(), other),
    "replaced": replaced,
    "updated": updated,
    "joined again": lambda model, other: (replaced(model, other).join_projections(), model)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_joined_model_decodes_with_the_weights_that_it_has(change):
    model, tokens = build(**VARIANTS["qwen"]), text(12)
    other = {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}
    model.join_projections()
    before = decoded(model, allocate(model), tokens)
    model = CHANGES[change](model, other)
    expected = whole(model, tokens)
    assert_close(decoded(model, allocate(model), tokens), expected)
    assert not torch.allclose(before, expected)


def test_a_copy_of_a_joined_model_has_weights_of_its_own():
    model, tokens = build(), text(12)
    model.join_projections()
    expected = decoded(model, allocate(model), tokens)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(decoded(model, allocate(model), tokens), expected)


def test_weights_that_train_again_get_their_gradient_though_they_are_joined():
    model = build(attention=["full"])
    model.join_projections()
    model.requires_grad_(True)
    whole(model, text(12)).square().sum().backward()
    assert all(parameter.grad.any() for name, parameter in model.named_parameters() if name != "lm_head.weight")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_prompt_in_chunks_and_its_continuation_equal_the_whole_document(name):
    model, tokens = build(**VARIANTS[name]), text(REACH + 30)
    expected = whole(model, tokens)
    block, select = model.config.nsa.compress_block_size, NSA.select_block_size
    for prompt, chunk_size in ((1, 1), (block - 1, 2), (block, 3), (select, select), (REACH + 1, select), (50, 1000)):
        cache = allocate(model)
        assert_close(prefill(model, tokens[:prompt], cache, 0, chunk_size), expected[prompt - 1])
        assert_close(decoded(model, cache, tokens[prompt : prompt + 5]), expected[prompt : prompt + 5])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_sequences_of_any_lengths_share_a_batch_as_if_alone(data):
    """Prompts, answers and further prompts in any order, each in chunks of any size; a reset row begins anew."""
    model = build(**VARIANTS[data.draw(st.sampled_from(sorted(VARIANTS)))])
    cache, texts = allocate(model, batch_size=3, capacity=95), [text(95, seed) for seed in range(3)]
    expected, lengths = [whole(model, tokens) for tokens in texts], [0, 0, 0]
    for _ in range(data.draw(st.integers(1, 6))):
        row = data.draw(st.integers(0, 2))
        action = data.draw(st.sampled_from(["prefill", "decode", "reset"]))
        if action == "prefill" and lengths[row] < 40:
            stop = lengths[row] + data.draw(st.integers(1, 25))
            hidden = prefill(model, texts[row][lengths[row] : stop], cache, row, data.draw(st.integers(1, 30)))
            lengths[row] = stop
            assert_close(hidden, expected[row][stop - 1])
        elif action == "decode":
            for _ in range(data.draw(st.integers(1, 5))):
                tokens = torch.stack([tokens[length] for tokens, length in zip(texts, lengths, strict=True)])
                hidden = decode(model, tokens, cache)
                assert_close(hidden, torch.stack([x[length] for x, length in zip(expected, lengths, strict=True)]))
                lengths = [length + 1 for length in lengths]
        elif action == "reset":
            cache.reset(row)
            lengths[row] = 0
        assert cache.lengths.tolist() == cache.host_lengths == lengths


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
def test_kernels_take_the_cache_as_it_is():
    def model_on(backend):
        nsa = dataclasses.replace(NSA, backend=backend, window_size=100)  # more than the cache has slots
        return build(attention=["nsa"], num_layers=1, head_dim=16, nsa=nsa).float()

    model, tokens = model_on("triton"), text(13)
    cache = Cache.allocate(model.config, 2, 13)
    hidden = [prefill(model, tokens[:10], cache, 1, chunk_size=8)]
    hidden += [decode(model, token.repeat(2), cache)[1] for token in tokens[10:]]
    torch.testing.assert_close(torch.stack(hidden), whole(model_on("eager"), tokens)[9:], rtol=1e-5, atol=1e-5)


def test_a_step_reads_nothing_back_and_moves_nothing():
    """What a CUDA graph asks for; tensors without numbers raise where a number would decide."""
    with torch.device("meta"):
        cache = Cache.allocate(CONFIG, batch_size=2, capacity=50, device="meta")
        hidden = decode(Transformer(CONFIG), torch.zeros(2, dtype=torch.int64), cache)
        assert hidden.shape == (2, CONFIG.hidden_size)
    model = build()
    cache = allocate(model, batch_size=2)
    before = [x.data_ptr() for x in cache.tensors()]
    for _ in range(NSA.window_size + 1):
        decode(model, torch.zeros(2, dtype=torch.int64), cache)
    after = [x.data_ptr() for x in cache.tensors()]
    assert before == after


def test_a_replayed_step_past_the_capacity_stays_in_its_row():
    """A CUDA graph runs no Python: nothing stops an idle sequence but its own numbers."""
    model = build()
    cache, tokens = allocate(model, batch_size=2, capacity=19), text(19)
    prefill(model, tokens, cache, 0)
    for token in tokens[:12]:
        cache.host_lengths[0] = 0
        hidden = decode(model, token.repeat(2), cache)
    assert_close(hidden[1], whole(model, tokens)[11])
    assert cache.lengths.tolist() == [19, 12]


@pytest.mark.parametrize("length", [3, 70])
def test_a_reset_leaves_nothing_of_a_sequence(length):
    """Not even what is not finite, which masks do not stop."""
    model = build()
    cache = allocate(model, batch_size=2)
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    for row in (0, 1):
        prefill(model, text(length), cache, row)
    decode(model, text(2), cache)
    kept = list(cache.tensors())
    assert all(x[0].isnan().any() for x in kept)
    cache.reset(0)
    assert not any(x[0].any() for x in kept)
    assert all(x[1].isnan().any() for x in kept)


def test_an_interrupted_prompt_leaves_an_empty_row_and_an_interrupted_step_is_taken_again(monkeypatch):
    model, tokens = build(), text(30)
    cache, expected = allocate(model, batch_size=2), whole(model, tokens)
    for row in (0, 1):
        prefill(model, tokens[:20], cache, row)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(model.layers[2].mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            decode(model, tokens[[20, 20]], cache)
        with pytest.raises(KeyboardInterrupt):
            prefill(model, tokens[20:], cache, 1)
    assert cache.host_lengths == cache.lengths.tolist() == [20, 0]
    assert_close(decode(model, tokens[[20, 0]], cache), expected[[20, 0]])


@pytest.mark.parametrize("name", VARIANTS)
def test_the_bytes_needed_are_the_bytes_allocated(name):
    config = dataclasses.replace(CONFIG, **VARIANTS[name])
    needed = Cache.bytes_needed(config, 3, 50, torch.bfloat16)
    cache = Cache.allocate(config, 3, 50, dtype=torch.bfloat16)
    tensors = list(cache.tensors())
    assert needed == sum(x.untyped_storage().nbytes() for x in [*tensors, cache.lengths])


def test_a_window_keeps_no_more_than_it_sees():
    cache = Cache.allocate(CONFIG, 1, 1000)
    nsa, full, sliding = cache.layers
    assert (full.tokens.size, sliding.tokens.size) == (1000, CONFIG.sliding_window)
    assert (nsa.branches[1].size, nsa.pending.size) == (NSA.window_size, NSA.compress_block_size)
    assert Cache.allocate(CONFIG, 1, 3).layers[2].tokens.size == 3


def test_tokens_past_the_capacity_are_an_error_that_names_them():
    model = build()
    cache = allocate(model, batch_size=2, capacity=10)
    with pytest.raises(ValueError, match="got 10 for 0 tokens of sequence 1 and 11 more"):
        prefill(model, text(11), cache, 1)
    prefill(model, text(10), cache, 1)
    with pytest.raises(ValueError, match="got 10 for 10 tokens of sequence 1 and 1 more"):
        decode(model, text(2), cache)
    assert cache.host_lengths == cache.lengths.tolist() == [0, 10]
    cache.reset(1)
    decode(model, text(2), cache)
    assert cache.lengths.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, cache: prefill(model, text(0), cache, 0), "tokens must be .* at least one token, got \\(0,\\)"),
        (lambda model, cache: prefill(model, text(4), cache, 0, 0), "chunk_size must be at least 1, got 0"),
        (lambda model, cache: decode(model, text(3), cache), r"tokens must be \[B\], \(2,\) here, got \(3,\)"),
        (lambda model, cache: prefill(model, text(4), cache, 2), "row must be from 0 to 1, got 2"),
        (lambda model, cache: decode(model.float(), text(2), cache), "slots must .* torch.float32, got torch.float64"),
        (lambda model, cache: prefill(model.float(), text(2), cache, 0), "must be .* torch.float32, got torch.float64"),
        (lambda model, _: allocate(model, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda model, _: allocate(model, capacity=0), "capacity must be at least 1, got 0"),
    ],
)
def test_wrong_calls_are_named(call, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        call(model, allocate(model, batch_size=2))
