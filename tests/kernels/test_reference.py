"""The reference against hand-computed numbers, dense attention and its own gradients, all in float64."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from nsa_kernels import reference
from nsa_kernels.geometry import CompressionWeights, NSAConfig
from nsa_kernels.rotary import apply_rotary
from support.packings import (
    PACKINGS,
    SMALL,
    Inputs,
    assert_same_blocks,
    chosen_sets,
    cu_seqlens,
    one_document,
    random_inputs,
    random_weights,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

COMPRESSED, SELECTED, SLIDING = range(3)

TINY = NSAConfig(
    compress_block_size=4,
    compress_stride=2,
    select_block_size=4,
    num_selected_blocks=3,
    num_init_blocks=1,
    num_local_blocks=1,
    window_size=3,
)
TINY_LENGTHS = [3, 0, 14]  # one document shorter than a block, one with more blocks than are selected

RANKINGS = [
    SMALL,
    replace(SMALL, num_init_blocks=0),
    replace(SMALL, num_init_blocks=0, num_local_blocks=1, num_selected_blocks=1),
    replace(SMALL, num_selected_blocks=3),
    replace(SMALL, num_init_blocks=2, num_local_blocks=3, num_selected_blocks=7),
    replace(SMALL, num_selected_blocks=64),
    replace(SMALL, compress_stride=1, select_block_size=4, num_selected_blocks=5),
    replace(SMALL, compress_block_size=12, compress_stride=3, select_block_size=6, num_selected_blocks=6),
]


def attend(inputs: Inputs, config: NSAConfig, block_indices: Tensor | None = None):
    return reference.native_sparse_attention(**inputs._asdict(), config=config, block_indices=block_indices)


def only(branch: int, inputs: Inputs) -> Inputs:
    """The same inputs with one gate open and the others shut."""
    gates = torch.zeros_like(inputs.gates)
    gates[..., branch] = 1
    return inputs._replace(gates=gates)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal (or masked) attention of one document by PyTorch: [L, H, D] -> [L, H, D_v]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    return o[0].transpose(0, 1)


def compressed(inputs: Inputs, config: NSAConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Compressed keys, compressed values and the lse of the queries over them."""
    compressed_k = reference.compress(inputs.compress_k, inputs.cu_seqlens, config, inputs.k_weights)
    compressed_v = reference.compress(inputs.compress_v, inputs.cu_seqlens, config, inputs.v_weights)
    _, lse = reference.compressed_attention(inputs.q, compressed_k, compressed_v, inputs.cu_seqlens, config)
    return compressed_k, compressed_v, lse


def gradcheck(function, leaves: list[Tensor], fast_mode: bool = False) -> bool:
    return torch.autograd.gradcheck(function, leaves, fast_mode=fast_mode)


@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_gradients_of_compress_match_finite_differences(kind):
    config = replace(TINY, compress_block_size=2, compress_stride=1)
    weights = random_weights(kind, 2, 2, config, torch.Generator().manual_seed(0))
    parts = [part.requires_grad_() for part in weights or () if part is not None]
    x = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(x, *parts):
        return reference.compress(x, cu_seqlens([1, 5]), config, CompressionWeights(*parts) if parts else None)

    assert gradcheck(function, [x, *parts])
    assert len(parts) == {"mean": 0, "linear": 3, "mlp": 5}[kind]


def test_gradients_of_compressed_attention_match_finite_differences():
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=2, num_kv_heads=1, qk_dim=2, v_dim=1, kind="mean")
    compressed_k, compressed_v, _ = (x.detach().requires_grad_() for x in compressed(inputs, TINY))

    def function(q, k, v):
        return reference.compressed_attention(q, k, v, inputs.cu_seqlens, TINY)

    assert gradcheck(function, [inputs.q, compressed_k, compressed_v])


def test_gradients_of_selected_attention_match_finite_differences():
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=4, num_kv_heads=2, qk_dim=1, v_dim=1, kind="mean")
    block_indices = attend(inputs, TINY).block_indices

    def function(q, k, v):
        return reference.selected_attention(q, k, v, block_indices, inputs.cu_seqlens, TINY)

    assert gradcheck(function, [inputs.q, inputs.k, inputs.v])
    assert any(len(blocks) < 4 for blocks, _ in chosen_sets(block_indices)[-2:])  # one block of the last is left out


def test_gradients_of_sliding_attention_match_finite_differences():
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=2, num_kv_heads=1, qk_dim=2, v_dim=1, kind="mean")

    def function(q, k, v):
        return reference.sliding_attention(q, k, v, inputs.cu_seqlens, TINY.window_size)

    assert gradcheck(function, [inputs.q, inputs.k, inputs.v])


@pytest.mark.parametrize("separate", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_gradients_of_every_input_match_finite_differences(kind, separate):
    inputs = random_inputs(TINY_LENGTHS, TINY, num_heads=4, num_kv_heads=2, kind=kind, separate=separate)
    leaves = inputs.leaves()

    def function(*tensors):
        return attend(inputs.replace_leaves(dict(zip(leaves, tensors, strict=True))), TINY).out

    assert gradcheck(function, list(leaves.values()), fast_mode=True)
    grads = torch.autograd.grad(function(*leaves.values()).square().sum(), list(leaves.values()))
    assert all(grad.count_nonzero() for grad in grads)


def test_no_gradient_passes_through_the_choice_of_blocks():
    inputs = only(SELECTED, random_inputs(TINY_LENGTHS, TINY))
    out, block_indices = attend(inputs, TINY)
    leaves = {name: leaf for name, leaf in inputs.leaves().items() if name != "gates"}
    grads = torch.autograd.grad(out.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert not block_indices.requires_grad
    for name, grad in zip(leaves, grads, strict=True):
        assert bool(grad.count_nonzero()) == (name in {"q", "k", "v"}), name


def test_mean_kind_averages_each_complete_block():
    x = torch.arange(9.0).view(9, 1, 1)
    summaries = reference.compress(x, cu_seqlens([3, 6]), SMALL)
    assert summaries.flatten().tolist() == [(3 + 4 + 5 + 6) / 4, (5 + 6 + 7 + 8) / 4, 0, 0]


@pytest.mark.parametrize("name", PACKINGS)
def test_summaries_lie_document_after_document_and_unused_rows_are_zero(name):
    inputs = random_inputs(PACKINGS[name], kind="mean", rotary=False)
    documents = inputs.compress_k.split(PACKINGS[name])
    blocks = [x.unfold(0, 4, 2).mean(-1) for x in documents if len(x) >= 4]
    expected = torch.cat([*blocks, inputs.compress_k.new_zeros(0, 2, 6)])
    summaries = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL)
    assert len(summaries) == max(len(inputs.q) // 2, 1)
    torch.testing.assert_close(summaries[: len(expected)], expected)
    assert not summaries[len(expected) :].any()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_compression_starts_as_the_mean(kind):
    x = random_inputs([21]).compress_k
    weights = random_weights(kind, 2, 6, SMALL, torch.Generator().manual_seed(0))
    last = ("in_weight", "in_bias") if kind == "linear" else ("out_weight", "out_bias")
    start = weights._replace(
        **{name: torch.zeros_like(getattr(weights, name)) for name in (*last, "position_embedding")}
    )
    mean = reference.compress(x, cu_seqlens([21]), SMALL)
    torch.testing.assert_close(reference.compress(x, cu_seqlens([21]), SMALL, start), mean, rtol=0, atol=0)
    assert not torch.allclose(reference.compress(x, cu_seqlens([21]), SMALL, weights), mean)


def test_linear_kind_reads_the_block_token_by_token():
    """in_weight picks dimension 1 of token 1 into output dimension 0, position embedding included there only."""
    config = replace(SMALL, compress_block_size=2, compress_stride=1)
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).unsqueeze(1)
    embedding = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]).unsqueeze(0)
    in_weight = torch.zeros(1, 6, 3)
    in_weight[0, 1 * 3 + 1, 0] = 1
    weights = CompressionWeights(embedding, in_weight, torch.tensor([[0.0, 0.0, 0.5]]))
    summaries = reference.compress(x, cu_seqlens([2]), config, weights)
    assert summaries[0, 0].tolist() == [2.5 + (5 + 50), 3.5, 4.5 + 0.5]


def test_mlp_kind_has_one_silu_hidden_layer():
    config = replace(SMALL, compress_block_size=2, compress_stride=1)
    weights = CompressionWeights(
        position_embedding=torch.tensor([[[0.0], [1.0]]]),
        in_weight=torch.tensor([[[1.0], [-1.0]]]),
        in_bias=torch.tensor([[0.5]]),
        out_weight=torch.tensor([[[2.0]]]),
        out_bias=torch.tensor([[3.0]]),
    )
    summaries = reference.compress(torch.tensor([[[1.0]], [[3.0]]]), cu_seqlens([2]), config, weights)
    hidden = 1.0 - (3.0 + 1.0) + 0.5  # -2.5
    assert summaries[0, 0, 0].item() == pytest.approx((1 + 3) / 2 + 2 * hidden / (1 + math.exp(-hidden)) + 3)


def test_each_kv_head_has_its_own_compression():
    inputs = random_inputs([21])
    summaries = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL, inputs.k_weights)
    for name, part in inputs.k_weights._asdict().items():
        changed = part.detach().clone()
        changed[0] += 1
        weights = inputs.k_weights._replace(**{name: changed})
        other = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL, weights)
        assert torch.equal(other[:, 1], summaries[:, 1]), name
        assert not torch.allclose(other[:, 0], summaries[:, 0]), name


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) == 1])
def test_compressed_branch_sees_the_blocks_wholly_in_the_past_or_present(name):
    inputs = random_inputs(PACKINGS[name])
    compressed_k, compressed_v, _ = compressed(inputs, SMALL)
    o, lse = reference.compressed_attention(inputs.q, compressed_k, compressed_v, inputs.cu_seqlens, SMALL)
    last_token = torch.arange(len(compressed_k)) * 2 + 3
    mask = last_token <= torch.arange(len(inputs.q))[:, None]  # [T, C]
    seen = mask.any(1)
    torch.testing.assert_close(o[seen], dense(inputs.q[seen], compressed_k, compressed_v, mask[seen]))
    assert int(seen.sum()) == max(len(inputs.q) - 3, 0)
    scores = torch.einsum("tkgd,ckd->tkgc", inputs.q.unflatten(1, (2, 2)), compressed_k).flatten(1, 2) / 6**0.5
    expected = scores.masked_fill(~mask[:, None], float("-inf")).logsumexp(-1)
    torch.testing.assert_close(lse[seen], expected[seen])


def test_a_query_that_sees_no_block_has_zero_output_and_zero_gradients():
    inputs = random_inputs([3, 1, 9], rotary=False)
    compressed_k, compressed_v, _ = (x.detach().requires_grad_() for x in compressed(inputs, SMALL))
    o, lse = reference.compressed_attention(inputs.q, compressed_k, compressed_v, inputs.cu_seqlens, SMALL)
    blind = [0, 1, 2, 3, 4, 5, 6]  # 3 + 1 tokens of the short documents, 3 of the long one
    assert not o[blind].any()
    assert not lse[blind].any()
    leaves = [inputs.q, compressed_k, compressed_v]
    for grad in torch.autograd.grad(o[blind].sum() + lse[blind].sum(), leaves, retain_graph=True):
        assert torch.equal(grad, torch.zeros_like(grad))
    for grad in torch.autograd.grad(o.square().sum() + lse.sum(), leaves):
        assert grad.isfinite().all()
        assert grad.any()
    assert o[7:].all()


def test_documents_without_a_block_leave_the_other_two_branches():
    inputs = random_inputs(PACKINGS["all_shorter_than_a_compress_block"])
    gates = inputs.gates.detach().clone()
    gates[..., COMPRESSED] = 0
    out = attend(inputs, SMALL).out
    assert torch.equal(out, attend(inputs._replace(gates=gates), SMALL).out)
    leaves = list(inputs.leaves().values())
    grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)
    assert out.any()


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) == 1])
def test_selected_branch_is_full_attention_exactly_up_to_n_blocks(name):
    inputs = only(SELECTED, random_inputs(PACKINGS[name]))
    out = attend(inputs, SMALL).out
    expected = dense(inputs.q, inputs.k, inputs.v)
    reach = SMALL.selected_tokens
    torch.testing.assert_close(out[:reach], expected[:reach], rtol=1e-12, atol=1e-12)
    if len(out) > reach:
        assert not torch.isclose(out[reach:], expected[reach:]).any()


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) == 1])
def test_sliding_branch_is_full_attention_exactly_up_to_the_window(name):
    inputs = only(SLIDING, random_inputs(PACKINGS[name]))
    out = attend(inputs, SMALL).out
    expected = dense(inputs.q, inputs.sliding_k, inputs.sliding_v)
    window = SMALL.window_size
    torch.testing.assert_close(out[:window], expected[:window], rtol=1e-12, atol=1e-12)
    if len(out) > window:
        assert not torch.isclose(out[window:], expected[window:]).any()


@pytest.mark.parametrize("window_size", [1, 2, 6, 40])
def test_sliding_window_counts_the_query_itself(window_size):
    inputs = random_inputs([23])
    o, lse = reference.sliding_attention(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, window_size)
    mask = torch.ones(23, 23, dtype=torch.bool).tril() & ~torch.ones(23, 23, dtype=torch.bool).tril(-window_size)
    torch.testing.assert_close(o, dense(inputs.q, inputs.k, inputs.v, mask))
    assert int(mask[-1].sum()) == min(window_size, 23)
    scores = torch.einsum("tkgd,skd->tkgs", inputs.q.unflatten(1, (2, 2)), inputs.k).flatten(1, 2) / 6**0.5
    torch.testing.assert_close(lse, scores.masked_fill(~mask[:, None], float("-inf")).logsumexp(-1))


def test_selected_branch_attends_to_the_past_tokens_of_the_given_blocks():
    inputs = random_inputs([5, 43])
    generator = torch.Generator().manual_seed(0)
    block_indices = torch.full((48, 2, 3), -1, dtype=torch.int32)
    mask = torch.zeros(4, 43, 43, dtype=torch.bool)
    for t in range(5):
        block_indices[t, :, 0] = 0
    for t in range(43):
        for g in range(2):
            earlier = torch.randperm(t // 8, generator=generator)[:2].tolist()
            for slot, j in enumerate(sorted([*earlier, t // 8])):
                block_indices[5 + t, g, slot] = j
                mask[2 * g : 2 * g + 2, t, 8 * j : min(8 * j + 8, t + 1)] = True
    o, lse = reference.selected_attention(inputs.q, inputs.k, inputs.v, block_indices, inputs.cu_seqlens, SMALL)
    torch.testing.assert_close(o[:5], dense(inputs.q[:5], inputs.k[:5], inputs.v[:5]))
    torch.testing.assert_close(o[5:], dense(inputs.q[5:], inputs.k[5:], inputs.v[5:], mask))
    scores = torch.einsum("tkgd,skd->kgts", inputs.q[5:].unflatten(1, (2, 2)), inputs.k[5:]).flatten(0, 1) / 6**0.5
    torch.testing.assert_close(lse[5:].T, scores.masked_fill(~mask, float("-inf")).logsumexp(-1))
    assert not mask.sum(-1).eq(torch.arange(1, 44)).all()  # some block is left out


def coefficients(config: NSAConfig, lengths: list[int], token: int) -> list[list[int]]:
    """How often each p_cmp[i] counts in each p_slc[j] for one query, [J][C].

    One KV head a compressed row; the keys are so that row i alone has p = 1 in head i, and p = 0 elsewhere.
    """
    num_rows = sum(lengths) // config.compress_stride
    q = torch.ones(sum(lengths), num_rows, 1, dtype=torch.float64)
    keys = torch.full((num_rows, num_rows), -1e4, dtype=torch.float64).fill_diagonal_(0).unsqueeze(-1)
    lse = torch.zeros(sum(lengths), num_rows, dtype=torch.float64)
    importance = reference.block_importance(q, keys, lse, cu_seqlens(lengths), config, scale=1.0)
    return importance[token].T.int().tolist()


@pytest.mark.parametrize(
    ("l", "d", "select", "length", "expected"),
    [
        pytest.param(
            32,
            16,
            64,
            256,
            [
                [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2, 0],
            ],
            id="defaults",
        ),
        pytest.param(2, 2, 4, 8, [[1, 1, 0, 0], [0, 0, 1, 1]], id="l = d"),
        pytest.param(2, 2, 2, 6, [[1, 0, 0], [0, 1, 0], [0, 0, 1]], id="l = d = l'"),
        pytest.param(4, 2, 2, 8, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]], id="l = 2l'"),
        pytest.param(
            4,
            1,
            4,
            12,
            [
                [4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 1, 2, 3, 4, 0, 0, 0],
            ],
            id="l = 4d = l'",
        ),
        pytest.param(
            6,
            2,
            4,
            13,
            [
                [2, 1, 0, 0, 0, 0],
                [1, 2, 2, 1, 0, 0],
                [0, 0, 1, 2, 0, 0],
                [0, 0, 0, 0, 0, 0],
            ],
            id="l = 3d, l' = 2d, last block shorter than a stride",
        ),
    ],
)
def test_importance_counts_the_chunks_a_compression_block_shares_with_a_selection_block(l, d, select, length, expected):  # noqa: E741
    config = NSAConfig(compress_block_size=l, compress_stride=d, select_block_size=select)
    assert coefficients(config, [length], length - 1) == expected


def test_importance_starts_anew_with_each_document():
    config = NSAConfig(compress_block_size=4, compress_stride=2, select_block_size=4)
    lengths = [5, 0, 11]  # 1, 0 and 4 blocks in 8 rows
    none = [0, 0, 0, 0, 0, 0, 0, 0]
    assert coefficients(config, lengths, 4) == [[2, 0, 0, 0, 0, 0, 0, 0], none, none]
    assert coefficients(config, lengths, 5 + 2) == [none, none, none]
    assert coefficients(config, lengths, 5 + 5) == [[0, 2, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0, 0], none]
    assert coefficients(config, lengths, 5 + 10) == [
        [0, 2, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 2, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0, 0],
    ]


def test_importance_adds_the_probabilities_of_the_group():
    """Defaults, two groups of two heads; p[i] of head h is (h + 1) · (i + 1), so that block 1 has 48 · (h + 1)."""
    p = torch.arange(1.0, 16.0, dtype=torch.float64)
    q = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64).log().view(1, 4, 1).expand(256, 4, 1)
    q = torch.cat([q, torch.ones_like(q)], -1)  # [T, 4, 2]
    keys = torch.stack([torch.ones_like(p), p.log()], -1)[:, None].expand(15, 2, 2)
    keys = torch.cat([keys, keys[:1]])  # 16 rows, the last unused
    lse = torch.zeros(256, 4, dtype=torch.float64)
    importance = reference.block_importance(q, keys, lse, cu_seqlens([256]), NSAConfig(), scale=1.0)
    blocks = torch.tensor([16.0, 48.0, 80.0, 96.0], dtype=torch.float64)
    torch.testing.assert_close(importance[-1], torch.stack([(1 + 2) * blocks, (3 + 4) * blocks]))


@pytest.mark.parametrize("config", RANKINGS)
def test_importance_of_all_blocks_counts_every_visible_probability_once_a_chunk(config):
    inputs = random_inputs([7, 50], config)
    compressed_k, _, lse = compressed(inputs, config)
    importance = reference.block_importance(inputs.q, compressed_k, lse, inputs.cu_seqlens, config)
    chunks = config.compress_block_size // config.compress_stride
    total = torch.zeros(57, 2, dtype=torch.float64)
    for t in range(57):
        position = t if t < 7 else t - 7
        total[t] = 2 * chunks if position >= config.compress_block_size - 1 else 0  # two heads a group
    torch.testing.assert_close(importance.sum(-1), total)


@pytest.mark.parametrize("config", RANKINGS)
def test_forced_blocks_come_first_and_then_the_most_important(config):
    lengths = [*PACKINGS["twice_the_reach"], 1, 0, 9, 40]
    inputs = random_inputs(lengths, config)
    compressed_k, _, lse = compressed(inputs, config)
    importance = reference.block_importance(inputs.q, compressed_k, lse, inputs.cu_seqlens, config)
    block_indices = reference.block_selection(inputs.q, compressed_k, lse, inputs.cu_seqlens, config)
    assert block_indices.shape == (sum(lengths), 2, config.num_selected_blocks)
    assert block_indices.dtype == torch.int32
    chosen, ranked = chosen_sets(block_indices), 0  # ascending, none twice, -1 at the end
    for start, end in pairwise(inputs.cu_seqlens.tolist()):
        for t in range(end - start):
            own = t // config.select_block_size
            init = set(range(min(config.num_init_blocks, own + 1)))
            local = set(range(max(own - config.num_local_blocks + 1, 0), own + 1))
            for g, blocks in enumerate(chosen[start + t]):
                assert own in blocks
                assert init | local <= blocks
                assert max(blocks) <= own
                assert len(blocks) == min(config.num_selected_blocks, own + 1)
                free, left = blocks - init - local, set(range(own + 1)) - blocks
                if free and left:
                    score = importance[start + t, g]
                    assert min(score[list(free)]) > max(score[list(left)])
                    ranked += 1
    assert ranked or config.num_selected_blocks in {1, 3, 64}


def test_forced_blocks_are_chosen_whatever_their_importance():
    inputs = random_inputs([67])
    compressed_k, _, lse = compressed(inputs, SMALL)
    importance = reference.block_importance(inputs.q, compressed_k, lse, inputs.cu_seqlens, SMALL)
    best = importance[40:].topk(4).indices  # queries with more blocks than are selected
    beaten = (best != 0).all(-1)
    assert beaten.any()
    block_indices = reference.block_selection(inputs.q, compressed_k, lse, inputs.cu_seqlens, SMALL)
    assert (block_indices[..., 0] == 0).all()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SMALL, [0, 1, 7, 8]),
        (replace(SMALL, num_selected_blocks=5), [0, 1, 2, 7, 8]),
        (replace(SMALL, num_selected_blocks=6), [0, 1, 2, 3, 7, 8]),
        (replace(SMALL, num_init_blocks=0), [1, 2, 7, 8]),  # block 0 has 7/8 of the others' importance
        (replace(SMALL, num_init_blocks=0, num_selected_blocks=9), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (replace(SMALL, num_init_blocks=0, num_local_blocks=1, num_selected_blocks=3), [1, 2, 8]),
        (replace(SMALL, num_selected_blocks=3), [0, 7, 8]),
        (replace(SMALL, num_selected_blocks=11), [0, 1, 2, 3, 4, 5, 6, 7, 8, -1, -1]),
    ],
)
def test_ties_go_to_the_lower_index(config, expected):
    """A query of zeros spreads its attention evenly: blocks 1 to 7 of 9 tie exactly."""
    q = torch.zeros(72, 2, 3, dtype=torch.float64)
    keys = torch.randn(36, 1, 3, dtype=torch.float64)
    _, lse = reference.compressed_attention(q, keys, keys, cu_seqlens([72]), config)
    importance = reference.block_importance(q, keys, lse, cu_seqlens([72]), config)
    assert importance[-1, 0, 1:8].unique().numel() == 1
    block_indices = reference.block_selection(q, keys, lse, cu_seqlens([72]), config)
    assert block_indices[-1, 0].tolist() == expected


def test_selected_blocks_before_any_visible_compression_block():
    """With l > l' a query may see three selection blocks and no compression block: all scores are 0."""
    config = NSAConfig(
        compress_block_size=8, compress_stride=2, select_block_size=2, num_selected_blocks=2, num_local_blocks=1
    )
    q, keys = torch.randn(7, 1, 3), torch.randn(3, 1, 3)
    block_indices = reference.block_selection(q, keys, torch.zeros(7, 1), cu_seqlens([7]), config)
    assert block_indices[:, 0].tolist() == [[0, -1], [0, -1], [0, 1], [0, 1], [0, 2], [0, 2], [0, 3]]


def test_all_heads_of_a_group_share_their_blocks_and_groups_choose_alone():
    inputs = random_inputs([67], num_heads=6, num_kv_heads=2)
    chosen = chosen_sets(attend(inputs, SMALL).block_indices)
    assert {len(query) for query in chosen} == {2}
    assert any(first != second for first, second in chosen)


@pytest.mark.parametrize("name", [name for name in PACKINGS if len(PACKINGS[name]) > 1])
def test_packing_is_invisible(name):
    inputs = random_inputs(PACKINGS[name])
    leaves = list(inputs.leaves().values())
    packed = attend(inputs, SMALL)
    cotangent = torch.randn(packed.out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    documents = [one_document(inputs, i, SMALL) for i, length in enumerate(PACKINGS[name]) if length]
    alone = [attend(document, SMALL) for document in documents]
    out = torch.cat([document.out for document in alone])
    torch.testing.assert_close(packed.out, out, rtol=1e-12, atol=1e-12)
    assert torch.equal(packed.block_indices, torch.cat([document.block_indices for document in alone]))
    grads, expected = (
        torch.autograd.grad(o, leaves, cotangent, allow_unused=True, materialize_grads=True) for o in (packed.out, out)
    )
    for leaf_name, grad, expected_grad in zip(inputs.leaves(), grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=leaf_name: f"{n}: {m}")
    assert name != "mixed" or all(grad.any() for grad in grads)


def test_each_gate_weighs_its_branch():
    inputs = random_inputs([5, 40])
    branches = torch.stack([attend(only(branch, inputs), SMALL).out for branch in (COMPRESSED, SELECTED, SLIDING)], -1)
    torch.testing.assert_close(attend(inputs, SMALL).out, (branches * inputs.gates.unsqueeze(-2)).sum(-1))
    assert branches[8:].all()


def test_branches_share_keys_and_values_by_default():
    shared = random_inputs([40], separate=False)
    k, v = shared.k, shared.v
    spelt_out = shared._replace(sliding_k=k, sliding_v=v, compress_k=k, compress_v=v)
    assert torch.equal(attend(shared, SMALL).out, attend(spelt_out, SMALL).out)


def test_given_blocks_are_used_instead_of_ranking():
    inputs = random_inputs([67])
    own_only = torch.full((67, 2, 1), -1, dtype=torch.int32)
    own_only[:, :, 0] = (torch.arange(67) // 8)[:, None]
    out, block_indices = attend(only(SELECTED, inputs), SMALL, own_only)
    torch.testing.assert_close(out[64:], dense(inputs.q[64:], inputs.k[64:], inputs.v[64:]))
    assert torch.equal(block_indices, own_only)


def test_rotary_turns_the_compressed_keys_only():
    inputs = random_inputs([5, 30])
    compressed_k, compressed_v, _ = compressed(inputs, SMALL)
    rotated = apply_rotary(compressed_k, *inputs.compressed_rotary)
    expected, lse = reference.compressed_attention(inputs.q, rotated, compressed_v, inputs.cu_seqlens, SMALL)
    out, block_indices = attend(only(COMPRESSED, inputs), SMALL)
    torch.testing.assert_close(out, expected)
    chosen = reference.block_selection(inputs.q, rotated, lse, inputs.cu_seqlens, SMALL)
    assert torch.equal(block_indices, chosen)
    unrotated = inputs._replace(compressed_rotary=None)
    assert not torch.allclose(attend(only(COMPRESSED, unrotated), SMALL).out, out)
    for branch in (SELECTED, SLIDING):
        both = [attend(only(branch, x), SMALL, block_indices).out for x in (inputs, unrotated)]
        assert torch.equal(*both)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (2, 1), (6, 2), (8, 2), (7, 1), (16, 2), (16, 1)])
def test_head_h_belongs_to_kv_head_h_over_g(num_heads, num_kv_heads):
    inputs = random_inputs([3, 37], num_heads=num_heads, num_kv_heads=num_kv_heads)
    out, block_indices = attend(inputs, SMALL)
    G = num_heads // num_kv_heads
    for g in range(num_kv_heads):
        leaves = {
            name: leaf[:, g * G : (g + 1) * G] if name in {"q", "gates"} else leaf[:, g : g + 1]
            for name, leaf in inputs.leaves().items()
            if "." not in name
        }
        weights = {name: leaf[g : g + 1] for name, leaf in inputs.leaves().items() if "." in name}
        alone = attend(inputs.replace_leaves(leaves | weights), SMALL)
        torch.testing.assert_close(out[:, g * G : (g + 1) * G], alone.out)
        assert torch.equal(block_indices[:, g : g + 1], alone.block_indices)


def test_scale_is_one_over_the_root_of_the_key_dimension_by_default():
    inputs = random_inputs([40], qk_dim=4)
    default = attend(inputs, SMALL).out
    arguments = inputs._asdict()
    assert torch.equal(default, reference.native_sparse_attention(**arguments, config=SMALL, scale=0.5).out)
    doubled = reference.native_sparse_attention(**(arguments | {"q": 2 * inputs.q}), config=SMALL, scale=0.25).out
    torch.testing.assert_close(default, doubled)
    assert not torch.allclose(default, reference.native_sparse_attention(**arguments, config=SMALL, scale=1.0).out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_keep_the_dtype_of_the_inputs_and_lse_is_at_least_float32(dtype):
    inputs = random_inputs([5, 30], dtype=dtype)
    compressed_k, compressed_v, lse = compressed(inputs, SMALL)
    _, selected_lse = reference.selected_attention(
        inputs.q, inputs.k, inputs.v, attend(inputs, SMALL).block_indices, inputs.cu_seqlens, SMALL
    )
    _, sliding_lse = reference.sliding_attention(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, 6)
    assert {compressed_k.dtype, compressed_v.dtype, attend(inputs, SMALL).out.dtype} == {dtype}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {lse.dtype, selected_lse.dtype, sliding_lse.dtype} == {wide}


def test_query_heads_must_be_a_multiple_of_kv_heads():
    inputs = random_inputs([9], num_heads=3, num_kv_heads=2)
    with pytest.raises(ValueError, match="multiple of key/value heads, got 3 and 2"):
        attend(inputs, SMALL)
    block_indices = torch.zeros(9, 2, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiple of key/value heads, got 3 and 2"):
        reference.selected_attention(inputs.q, inputs.k, inputs.v, block_indices, inputs.cu_seqlens, SMALL)


def test_choices_may_differ_only_where_importance_ties():
    expected = torch.tensor([[[0, 1, 4]], [[0, 2, 4]]], dtype=torch.int32)
    actual = torch.tensor([[[0, 1, 4]], [[0, 3, 4]]], dtype=torch.int32)
    importance = torch.tensor([[[0.0, 1.0, 1.0, 2.0, 0.0]], [[0.0, 1.0, 1.5, 1.5 + 1e-7, 0.0]]], dtype=torch.float64)
    assert assert_same_blocks(actual, expected, importance, tolerance=1e-6) == 1
    assert assert_same_blocks(expected, expected, importance, tolerance=0.0) == 0
    with pytest.raises(AssertionError, match=r"query 1, KV head 0: chose \[0, 3, 4\], expected \[0, 2, 4\]"):
        assert_same_blocks(actual, expected, importance, tolerance=1e-8)
    fewer = torch.tensor([[[0, 1, 4]], [[0, 4, -1]]], dtype=torch.int32)
    with pytest.raises(AssertionError, match="query 1"):
        assert_same_blocks(fewer, expected, importance, tolerance=10.0)
    for broken in ([0, 0, 4], [0, -1, 4], [4, 1, 0]):
        with pytest.raises(AssertionError, match="not ascending"):
            chosen_sets(torch.tensor([[broken]]))
