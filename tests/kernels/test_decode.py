"""Attention to a cache against the same operator on whole documents, at every position."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nsa_kernels import NSAConfig, native_sparse_attention, reference
from nsa_kernels.decode.attention import (
    LayerCache,
    NewTokens,
    append_tokens,
    chunk_attention,
    decode_attention,
    decode_dense_attention,
)
from nsa_kernels.rotary import apply_rotary
from support.packings import SMALL, assert_same_blocks, random_inputs

GEOMETRIES = {
    "small": SMALL,
    "no_overlap": NSAConfig(
        compress_block_size=4, compress_stride=4, select_block_size=4, num_selected_blocks=3, window_size=5
    ),
    "summary_wider_than_block": NSAConfig(
        compress_block_size=16, compress_stride=2, select_block_size=4, num_selected_blocks=5, window_size=1
    ),
    "no_initial_block": NSAConfig(
        compress_block_size=4, compress_stride=2, select_block_size=8,
        num_selected_blocks=2, num_init_blocks=0, num_local_blocks=1, window_size=100,
    ),
}  # fmt: skip


class Document:
    """One document, its summaries, and what the operator computes of the whole of it."""

    def __init__(self, length, config, *, separate=True, dtype=torch.float64, seed=0, **shape):
        self.config, self.length = config, length
        inputs = random_inputs([length], config, separate=separate, dtype=dtype, seed=seed, **shape)
        self.inputs = inputs
        rotary = inputs.compressed_rotary
        compress_k = inputs.k if inputs.compress_k is None else inputs.compress_k
        compress_v = inputs.v if inputs.compress_v is None else inputs.compress_v
        with torch.no_grad():
            self.summary_k = reference.compress(compress_k, inputs.cu_seqlens, config, inputs.k_weights)
            self.summary_k = apply_rotary(self.summary_k, *rotary)
            self.summary_v = reference.compress(compress_v, inputs.cu_seqlens, config, inputs.v_weights)
            self.whole = native_sparse_attention(**inputs._asdict(), config=config, backend="eager")
        self.sliding_k = inputs.k if inputs.sliding_k is None else inputs.sliding_k
        self.sliding_v = inputs.v if inputs.sliding_v is None else inputs.sliding_v

    def importance(self, position):
        """Of the blocks at one position, [1, H_kv, J]."""
        inputs = self.inputs
        _, lse = reference.compressed_attention(
            inputs.q, self.summary_k, self.summary_v, inputs.cu_seqlens, self.config
        )
        args = inputs.q, self.summary_k, lse, inputs.cu_seqlens, self.config
        return reference.block_importance(*args)[position : position + 1]


def cache_of(documents, positions, config, slots, ring):
    """The cache in which document b has tokens up to positions[b], and what counts for nothing is 1e4."""
    B, inputs = len(documents), documents[0].inputs
    (H_KV, D_QK), D_V = inputs.k.shape[1:], inputs.v.shape[2]
    rows = slots // config.compress_stride

    def blank(size, D):
        return torch.full((B, size, H_KV, D), 1e4, dtype=inputs.q.dtype)

    cache = LayerCache(*(blank(size, D) for size in (slots, ring, rows) for D in (D_QK, D_V)))
    for b, (document, position) in enumerate(zip(documents, positions, strict=True)):
        length = position + 1
        cache.k[b, :length], cache.v[b, :length] = document.inputs.k[:length], document.inputs.v[:length]
        for token in range(max(0, length - ring), length):
            cache.sliding_k[b, token % ring] = document.sliding_k[token]
            cache.sliding_v[b, token % ring] = document.sliding_v[token]
        complete = max(0, (length - config.compress_block_size) // config.compress_stride + 1)
        cache.summary_k[b, :complete] = document.summary_k[:complete]
        cache.summary_v[b, :complete] = document.summary_v[:complete]
    return cache


def assert_decodes(documents, positions, config, backend, tolerance, ring=None):
    slots = -(-(max(positions) + 1) // config.select_block_size) * config.select_block_size
    cache = cache_of(documents, positions, config, slots, ring or config.window_size)
    pairs = list(zip(documents, positions, strict=True))
    q = torch.stack([document.inputs.q[position] for document, position in pairs]).detach()
    gates = torch.stack([document.inputs.gates[position] for document, position in pairs]).detach()
    result = decode_attention(q, gates, cache, torch.tensor(positions).int(), config, backend=backend)
    for b, (document, position) in enumerate(pairs):
        expected = document.whole.block_indices[position : position + 1]
        chosen = result.block_indices[b : b + 1]
        if torch.equal(chosen, expected):
            torch.testing.assert_close(result.out[b], document.whole.out[position], rtol=tolerance, atol=tolerance)
        else:
            assert_same_blocks(chosen, expected, document.importance(position), tolerance)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("separate", [True, False])
def test_token_by_token_equals_the_whole_document(geometry, separate):
    config = GEOMETRIES[geometry]
    length = 2 * config.selected_tokens + config.compress_stride + 1
    documents = [Document(length, config, separate=separate, seed=seed) for seed in range(3)]
    for position in range(length):  # three sequences of different lengths at a time
        positions = [position, (position * 7 + 3) % length, length - 1 - position]
        assert_decodes(documents, positions, config, "eager", 1e-10, ring=config.window_size + position % 3)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_chunk_by_chunk_equals_the_whole_document(geometry):
    config = GEOMETRIES[geometry]
    document = Document(2 * config.selected_tokens + 5, config)
    for chunk in (1, 3, config.compress_block_size - 1, config.select_block_size, document.length):
        assert_chunks(document, range(0, document.length, chunk), "eager", 1e-10)


def unread(x, first=0, last=0):
    """Rows that count for nothing before and behind, not even finite."""
    return torch.cat([x.new_full((first, *x.shape[1:]), torch.nan), x, x.new_full((last, *x.shape[1:]), torch.nan)])


def assert_chunks(document, starts, backend, tolerance):
    config, inputs = document.config, document.inputs.to()
    for start, stop in itertools.pairwise([*starts, document.length]):
        recent = max(0, start - config.window_size + 1)
        complete = max(0, (stop - config.compress_block_size) // config.compress_stride + 1)
        keys = inputs.k[:stop], inputs.v[:stop]
        sliding = (unread(x[recent:stop], first=min(2, recent)) for x in (document.sliding_k, document.sliding_v))
        summaries = (unread(x[:complete], last=2) for x in (document.summary_k, document.summary_v))
        q, gates = inputs.q[start:stop].detach(), inputs.gates[start:stop].detach()
        result = chunk_attention(q, gates, *keys, *sliding, *summaries, config, backend=backend)
        for i, t in enumerate(range(start, stop)):
            expected, chosen = document.whole.block_indices[t : t + 1], result.block_indices[i : i + 1]
            if torch.equal(chosen, expected):
                torch.testing.assert_close(result.out[i], document.whole.out[t], rtol=tolerance, atol=tolerance)
            else:
                assert_same_blocks(chosen, expected, document.importance(t), tolerance)


@pytest.mark.parametrize("window_size", [None, 1, 7, 64])
def test_dense_attention_of_one_token_equals_that_of_the_whole_document(window_size):
    assert_decodes_dense("eager", torch.float64, window_size, 1e-10)


def assert_decodes_dense(backend, dtype, window_size, tolerance, length=40, **shape):
    document = Document(length, SMALL, dtype=dtype, **shape)
    q, k, v = (x.detach() for x in (document.inputs.q, document.inputs.k, document.inputs.v))
    cu_seqlens, reach = document.inputs.cu_seqlens, length if window_size is None else window_size
    expected, _ = reference.sliding_attention(q, k, v, cu_seqlens, reach)
    slots = length + 5 if window_size is None else window_size
    for positions in ([0, length - 1], [min(window_size or 3, length - 1), 9]):
        cached = [torch.full((2, slots, *x.shape[1:]), 1e4, dtype=dtype) for x in (k, v)]
        for b, position in enumerate(positions):
            for token in range(max(0, position + 1 - slots), position + 1):
                cached[0][b, token % slots], cached[1][b, token % slots] = k[token], v[token]
        where = torch.tensor(positions).int()
        out = decode_dense_attention(q[positions], *cached, where, window_size, backend=backend)
        torch.testing.assert_close(out, expected[positions], rtol=tolerance, atol=tolerance)


SHAPES = {
    "groups_of_3_wide_keys": {"num_heads": 6, "num_kv_heads": 2, "qk_dim": 24, "v_dim": 16},
    "one_kv_head": {"num_heads": 4, "num_kv_heads": 1, "qk_dim": 16, "v_dim": 16},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize(("geometry", "shape"), [("small", "groups_of_3_wide_keys"), ("no_overlap", "one_kv_head"),
                                                 ("summary_wider_than_block", "one_kv_head"),
                                                 ("no_initial_block", "one_kv_head")])  # fmt: skip
def test_kernels_decode_as_the_whole_document(geometry, shape, monkeypatch):
    config = GEOMETRIES[geometry]
    monkeypatch.setattr("nsa_kernels.decode.step._SEGMENT", 4 if geometry == "small" else 1024)
    config = dataclasses.replace(config, select_block_size=max(config.select_block_size, 4))
    length = 4 * config.select_block_size + config.selected_tokens + 1 + config.compress_stride + 1
    documents = [Document(length, config, dtype=torch.float32, seed=seed, **SHAPES[shape]) for seed in range(3)]
    for position in (config.compress_block_size - 2, config.compress_block_size - 1, config.selected_tokens):
        positions = [position, (position * 7 + 3) % length, length - 1 - position]
        assert_decodes(documents, positions, config, "triton", 1e-5, ring=config.window_size + 3)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("programs", [1, 3, 4, 7, 64])
def test_chosen_blocks_may_be_divided_over_any_number_of_programs(programs, monkeypatch):
    decode_triton = pytest.importorskip("nsa_kernels.decode.step", exc_type=ImportError)
    monkeypatch.setattr(decode_triton, "_TOKENS", decode_triton.Launch(programs=programs))
    config = dataclasses.replace(SMALL, num_selected_blocks=5)  # ten steps of 4 keys
    document = Document(2 * config.selected_tokens, config, dtype=torch.float32, **SHAPES["one_kv_head"])
    for position in (0, config.select_block_size, config.selected_tokens - 2, document.length - 1):
        assert_decodes([document], [position], config, "triton", 1e-5)
    assert_decodes(8 * [document], [0, 7, 8, 30, 40, 41, 63, 79], config, "triton", 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0, 2, width=32), min_size=1, max_size=32), st.integers(0, 2), st.integers(3, 7), st.booleans()
)
def test_few_rounds_find_the_largest_and_the_first_of_equal_ones(importance, num_forced, n, many_ties):
    decode_triton = pytest.importorskip("nsa_kernels.decode.step", exc_type=ImportError)
    importance = torch.tensor(importance)
    bits = (importance.round() if many_ties else importance).view(torch.int32)
    bits[:num_forced] = decode_triton.FORCED.value
    expected = bits.argsort(descending=True, stable=True)[:n].sort().values.int()
    indices, where = torch.full((1, 1, n), -1).int(), torch.tensor([10**6]).int()
    blocks = torch.arange(len(bits)).int()
    decode_triton._merge_segments_kernel[(1, 1)](where, bits, blocks, indices, len(bits), 1, n, 1, 32, 8, False)
    assert indices.flatten()[: len(expected)].tolist() == expected.tolist()
    assert (indices.flatten()[len(expected) :] == -1).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_logits_of_gates_weigh_by_their_sigmoid_wherever_they_stand(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    B, S, H, H_kv, D = 2, 64, 14, 2, 80
    sizes = S, S, SMALL.window_size, SMALL.window_size, *2 * [S // SMALL.compress_stride]
    q, cache = torch.randn(B, H, D), LayerCache(*(torch.randn(B, slots, H_kv, D) for slots in sizes))
    positions, joint = torch.tensor([63, 20]).int(), 3 * torch.randn(B, 60)
    apart = torch.randn(B, 3, H).mT  # the branches of a head do not follow each other
    for logits in (joint[:, 5:47].unflatten(1, (H, 3)), apart):
        args = cache, positions, SMALL
        result = decode_attention(q, logits, *args, gate_logits=True, backend=backend)
        expected = decode_attention(q, logits.sigmoid().contiguous(), *args, backend="eager")
        torch.testing.assert_close(result.out, expected.out, rtol=1e-5, atol=1e-5)
        weighed = decode_attention(q, logits, *args, backend=backend)
        assert not torch.allclose(weighed.out, result.out, atol=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("geometry", ["small", "no_overlap"])
def test_kernels_take_chunk_by_chunk(geometry):
    config = GEOMETRIES[geometry]
    shape = SHAPES["groups_of_3_wide_keys"]
    document = Document(config.selected_tokens + 13, config, dtype=torch.float32, **shape)
    starts = [0, 1, config.compress_block_size - 1, config.selected_tokens - 2, config.selected_tokens + 5]
    assert_chunks(document, starts, "triton", 1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")
@pytest.mark.parametrize("window_size", [None, 7])
def test_kernels_of_dense_attention_equal_that_of_the_whole_document(window_size):
    shape = SHAPES["groups_of_3_wide_keys"]
    assert_decodes_dense("triton", torch.float32, window_size, 1e-5, **shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tile_of_keys_is_a_power_of_two_that_fits_its_stage(dtype, monkeypatch):
    decode_parts = pytest.importorskip("nsa_kernels.decode.parts", exc_type=ImportError)
    monkeypatch.setattr(decode_parts, "interpreted", lambda: False)
    for qk_dim, v_dim in itertools.product((16, 64, 80, 96, 128, 192, 256), repeat=2):
        sizes = torch.zeros(2, 4, qk_dim), torch.zeros(2, 64, 2, v_dim)
        keys = decode_parts.sizes_of(*(x.to(dtype) for x in sizes)).keys
        assert keys in (16, 32, 64)
        assert keys == 16 or keys * (qk_dim + v_dim) * dtype.itemsize <= decode_parts._STAGE_BYTES


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_new_tokens_are_rotated_and_stored_in_their_slots(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a GPU")
    B, H, H_KV, D_QK, D_V, HALF = 3, 6, 2, 24, 8, 5
    positions = torch.tensor([0, 9, 30]).int()
    cos, sin = torch.rand(2, B, HALF)
    wide = torch.randn(B, H + 1, D_QK)
    q = wide[:, :H] if backend == "triton" else wide[:, 1:]  # part of a wider tensor, as maps computed as one give it
    pairs = [
        NewTokens(
            torch.randn(B, H_KV + 2, D_QK)[:, 1:-1], torch.randn(B, D_V, H_KV).mT,
            torch.zeros(B, slots, H_KV, D_QK), torch.zeros(B, slots, H_KV, D_V), rotate,
        )
        for slots, rotate in ((40, True), (7, True), (4, False))
    ]  # fmt: skip
    out = append_tokens(q, pairs, positions, (cos, sin), backend=backend)
    torch.testing.assert_close(out, apply_rotary(q, cos, sin))
    for new in pairs:
        k = apply_rotary(new.k, cos, sin) if new.rotate else new.k
        for b, position in enumerate(positions.tolist()):
            slot = position % new.k_slots.shape[1]
            torch.testing.assert_close(new.k_slots[b, slot], k[b])
            assert torch.equal(new.v_slots[b, slot], new.v[b])
            others = [other for other in range(new.k_slots.shape[1]) if other != slot]
            assert not new.k_slots[b, others].any()
            assert not new.v_slots[b, others].any()


def test_a_cache_that_does_not_fit_is_refused_by_name():
    document = Document(20, SMALL)
    cache = cache_of([document], [19], SMALL, 24, 6)
    q, gates, positions = document.inputs.q[19:], document.inputs.gates[19:], torch.tensor([19]).int()

    def decoded(*, q=q, gates=gates, positions=positions, config=SMALL, **parts):
        decode_attention(q, gates, cache._replace(**parts), positions, config)

    decoded()
    for broken, message in (
        ({"positions": positions[:0]}, r"positions must be \(1,\) here, got \(0,\)"),
        ({"gates": gates[..., :2]}, r"gates must be \(1, 4, 3\) here, got \(1, 4, 2\)"),
        ({"summary_v": cache.summary_v[..., :1]}, "summary_v must be"),
        ({"k": cache.k[:, :20], "v": cache.v[:, :20]}, "k must have a multiple of select_block_size slots, 8, got 20"),
        ({"config": dataclasses.replace(SMALL, window_size=9)}, "sliding_k must have at least window_size slots, 9"),
        (
            {"summary_k": cache.summary_k[:, :3], "summary_v": cache.summary_v[:, :3]},
            "summary_k must have a row for every compress_stride slots of k, 12, got 3",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            decoded(**broken)
    x, summaries = document.inputs, (document.summary_k[:2], document.summary_v[:2])
    with pytest.raises(ValueError, match="summary_k must hold the 9 complete blocks of 20 tokens, got 2"):
        chunk_attention(q, gates, x.k, x.v, document.sliding_k, document.sliding_v, *summaries, SMALL)
