"""The Triton kernels under Triton's interpreter, on the CPU: every stage and the whole operator, and their gradients.

The interpreter computes bfloat16 wrongly and knows no tensor cores; `test_triton_cuda.py` covers the rest.
"""

import sys
import zlib
from dataclasses import replace

import pytest
import torch
from nsa_kernels import NSAConfig, eager, native_sparse_attention, reference
from nsa_kernels.packing import document_positions
from nsa_kernels.rotary import apply_rotary
from support.measured import Values, assert_strays_at_most_twice_as_far, attend, evaluate
from support.packings import PACKINGS, SMALL, Inputs, assert_same_blocks, chosen_sets, cu_seqlens, random_inputs
from torch import Tensor

kernels = pytest.importorskip("support.kernels", exc_type=ImportError)
tuning = pytest.importorskip("nsa_kernels.triton.tuning", exc_type=ImportError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")

DTYPES = {"float32": torch.float32, "float16": torch.float16}
EPSILON = {torch.float32: 2e-6, torch.float16: 1e-3}  # 16 units of rounding, and 1: half of what is rounded is an input
EDGES = ["one_token", "compress_block_plus_1", "twice_the_reach", "empty_documents_at_both_ends"]
RANKED = replace(SMALL, select_block_size=4)
LENGTHS = [3, 30, 1]  # half of the second document sees more than the 16 tokens that RANKED selects

GEOMETRIES = {
    "l'/d = l/d = 1, n = 3": NSAConfig(
        compress_block_size=4, compress_stride=4, select_block_size=4, num_selected_blocks=3, num_local_blocks=1,
        window_size=5,
    ),
    "l'/d = 2, l/d = 8, window of 1": NSAConfig(
        compress_block_size=16, compress_stride=2, select_block_size=4, num_selected_blocks=5, window_size=1
    ),
    "l'/d = 4, l/d = 3, two initial blocks": NSAConfig(
        compress_block_size=6, compress_stride=2, select_block_size=8, num_selected_blocks=5, num_init_blocks=2,
        window_size=11,
    ),
    "l'/d = 8, l/d = 2, one block in all": NSAConfig(
        compress_block_size=4, compress_stride=2, select_block_size=16, num_selected_blocks=1, num_init_blocks=0,
        num_local_blocks=1, window_size=100,
    ),
    "l'/d = 1, l/d = 4, n = 7, one local block": NSAConfig(
        compress_block_size=16, compress_stride=4, select_block_size=4, num_selected_blocks=7, num_local_blocks=1,
        window_size=2,
    ),
    "l = d = 1, no initial block": NSAConfig(
        compress_block_size=1, compress_stride=1, select_block_size=8, num_selected_blocks=2, num_init_blocks=0,
        num_local_blocks=1, window_size=3,
    ),
    "l' = l = d = 1": NSAConfig(
        compress_block_size=1, compress_stride=1, select_block_size=1, num_selected_blocks=5, num_init_blocks=1,
        num_local_blocks=1, window_size=3,
    ),
}  # fmt: skip


LARGEST = 2**62  # a power of two, as the kernels want blocks
HUGE = {
    "window": replace(RANKED, window_size=sys.maxsize),
    "selection blocks": replace(RANKED, select_block_size=LARGEST, num_selected_blocks=3),
    "compression blocks": replace(RANKED, compress_block_size=LARGEST),
    "selected blocks": replace(RANKED, num_selected_blocks=1000, num_local_blocks=999),
}


def every(names):
    """One case a name, the slow ones first, so that workers end together; `mixed` has the lengths of many others."""
    marks = {"mixed": [pytest.mark.slow]}
    return [
        pytest.param(name, marks=marks.get(name, [])) for name in sorted(names, key=lambda name: -sum(PACKINGS[name]))
    ]


def compare(stage, inputs: Inputs) -> set[str]:
    """A stage of each backend, in `inputs`' dtype and in float64."""
    truth = evaluate(lambda x: stage(reference, x), inputs.to(dtype=torch.float64))
    actual, plain = (evaluate(lambda x, b=b: stage(b, x), inputs) for b in (kernels, eager))
    return assert_strays_at_most_twice_as_far(actual, plain, truth, EPSILON[inputs.q.dtype])


def compare_whole(inputs: Inputs, config: NSAConfig) -> tuple[set[str], Tensor]:
    """The whole operator of each backend on the blocks that the kernels chose; also returns those."""
    actual = attend(inputs, config, "triton")
    blocks = actual["block_indices"]
    plain = attend(inputs, config, "eager", blocks)
    truth = attend(inputs.to(dtype=torch.float64), config, "reference", blocks)
    return assert_strays_at_most_twice_as_far(actual, plain, truth, EPSILON[inputs.q.dtype]), blocks


def triton_attention(inputs: Inputs, config: NSAConfig, **options) -> Values:
    return native_sparse_attention(**inputs._asdict(), config=config, backend="triton", **options)._asdict()


def ranked_rows(inputs: Inputs, config: NSAConfig) -> int:
    """Queries that see more blocks than they choose."""
    position = document_positions(inputs.cu_seqlens, len(inputs.q))
    return int((position >= config.selected_tokens).sum())


def summaries(inputs: Inputs, config: NSAConfig) -> tuple[Tensor, Tensor]:
    """Keys and values with the shape of summaries."""
    rows = max(len(inputs.q) // config.compress_stride, 1)
    return inputs.compress_k[:rows], inputs.compress_v[:rows]


def random_blocks(inputs: Inputs, config: NSAConfig) -> Tensor:
    """The own block and others of the past, int32 [T, H_kv, n]."""
    generator = torch.Generator().manual_seed(2)
    H_kv, n = inputs.k.shape[1], config.num_selected_blocks
    own = (document_positions(inputs.cu_seqlens, len(inputs.q)) // config.select_block_size).tolist()
    indices = torch.full((len(own), H_kv, n), -1, dtype=torch.int32)
    for t, last in enumerate(own):
        for g in range(H_kv):
            chosen = torch.randperm(last, generator=generator)[: (t + g) % n].sort().values
            indices[t, g, : len(chosen) + 1] = torch.cat([chosen, torch.tensor([last])])
    return indices


def small(lengths: list[int], config: NSAConfig = RANKED, **options) -> Inputs:
    """Inputs with few heads, since the interpreter is slow."""
    sizes = {"num_heads": 2, "num_kv_heads": 1, "qk_dim": 8, "v_dim": 16, "dtype": torch.float32}
    return random_inputs(lengths, config, **(sizes | options))


def problem(name: str, dtype: torch.dtype = torch.float32, **options) -> Inputs:
    return small(PACKINGS[name], SMALL, dtype=dtype, seed=zlib.crc32(name.encode()), **options)


@pytest.mark.parametrize("name", every(PACKINGS))
def test_whole_operator_on_every_packing(name):
    inputs = problem(name)
    compared, blocks = compare_whole(inputs, SMALL)
    assert {"out", "d v", "d sliding_v", "d gates"} <= compared
    assert len(chosen_sets(blocks)) == sum(PACKINGS[name])
    assert ("d k_weights.in_weight" in compared) == any(length >= 6 for length in PACKINGS[name])  # two blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", every(EDGES))
def test_whole_operator_in_half_precision(name):
    compared, _ = compare_whole(problem(name, torch.float16, kind="linear"), SMALL)
    assert {"out", "d v", "d sliding_v", "d gates"} <= compared


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_size", "dtype"),
    [*((group_size, "float32") for group_size in (1, 2, 3, 4, 7, 8)), (3, "float16"), (8, "float16")],
)
def test_whole_operator_for_every_group_size(group_size, dtype):
    H_kv = 2 if group_size < 3 else 1
    inputs = small(LENGTHS, num_heads=H_kv * group_size, num_kv_heads=H_kv, kind="mean", dtype=DTYPES[dtype])
    compared, blocks = compare_whole(inputs, RANKED)
    assert len(compared) == len(inputs.leaves()) + 2
    assert H_kv == 1 or any(first != second for first, second in chosen_sets(blocks))


@pytest.mark.slow
@pytest.mark.parametrize("separate", [True, False], ids=["separate", "shared"])
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_whole_operator_for_every_kind_of_compression_and_sharing(kind, separate):
    inputs = small(LENGTHS, kind=kind, separate=separate, rotary=separate, v_dim=4)
    compared, _ = compare_whole(inputs, RANKED)
    assert len(compared) == len(inputs.leaves()) + 2
    assert len(inputs.leaves()) == {"mean": 0, "linear": 6, "mlp": 10}[kind] + (8 if separate else 4)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_whole_operator_for_other_geometries(name):
    config = GEOMETRIES[name]
    lengths = [min(2 * config.selected_tokens + 3, 75), 1, config.compress_block_size + config.compress_stride]
    inputs = small(lengths, config, kind="linear", qk_dim=4, v_dim=8)
    compared, _ = compare_whole(inputs, config)
    assert compared >= {"out", "block_indices", "d q", "d k", "d compress_k", "d v_weights.in_weight"}
    assert ranked_rows(inputs, config) > 5


@pytest.mark.parametrize("name", HUGE)
def test_sizes_that_no_document_reaches_mean_all_of_it(name):
    config, lengths = HUGE[name], [1, 9]
    inputs = small(lengths, config, kind="mean", rotary=False)
    compared, blocks = compare_whole(inputs, config)
    assert {"out", "d q", "d v", "d gates"} <= compared
    assert ("d compress_k" in compared) == ("compression" not in name)
    assert blocks.shape[2] == config.num_selected_blocks
    if name == "selected blocks":
        assert blocks[9, 0, :4].tolist() == [0, 1, 2, -1]
        assert (blocks[..., 3:] == -1).all()


@pytest.mark.parametrize(
    ("qk_dim", "v_dim", "dtype"),
    [(4, 12, "float32"), (20, 4, "float32"), (68, 36, "float32"), (24, 8, "float16"), (8, 40, "float16")],
)
def test_whole_operator_for_head_dimensions_that_are_no_powers_of_two(qk_dim, v_dim, dtype):
    inputs = small(LENGTHS, qk_dim=qk_dim, v_dim=v_dim, kind="mean", dtype=DTYPES[dtype])
    compared, _ = compare_whole(inputs, RANKED)
    assert len(compared) == len(inputs.leaves()) + 2


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize("group_size", [1, 3])
def test_the_size_of_a_tile_changes_nothing(monkeypatch, rows, keys, group_size):
    """With one head a group and 64 rows, a tile of the selected branch uses all 32 bits of its mask."""
    monkeypatch.setattr(tuning, "_INTERPRETED", dict.fromkeys(tuning._INTERPRETED, tuning.TunedTile(rows, keys, 4, 1)))
    inputs = small([3, 67, 1], SMALL, num_heads=group_size, kind="mean")
    compared, _ = compare_whole(inputs, SMALL)
    assert len(compared) == len(inputs.leaves()) + 2


def test_work_cut_in_many_parts_changes_nothing(monkeypatch):
    """Small inputs are never cut: the queries of a block in items, those of the ranking in chunks."""
    inputs = small([3, 67, 1], SMALL)
    whole = attend(inputs, SMALL, "triton")
    monkeypatch.setattr("nsa_kernels.triton.block_attention._ITEM_LENGTH", 8)
    monkeypatch.setattr("nsa_kernels.triton.block_selection._CHUNK_BYTES", 1)
    parts = attend(inputs, SMALL, "triton")
    changed = {name for name, value in whole.items() if not torch.equal(value, parts[name])}
    assert changed in ({"d k"}, {"d v"}, {"d k", "d v"})  # sums in another order
    for name in changed:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


def test_inputs_need_not_be_contiguous():
    inputs = small(LENGTHS, kind="linear")
    strided = {
        name: torch.stack([leaf, leaf], -1)[..., 0].detach().requires_grad_()
        for name, leaf in inputs.leaves().items()
        if "." not in name
    }
    assert not strided["q"].is_contiguous()
    expected, actual = (attend(x, RANKED, "triton") for x in (inputs, inputs.replace_leaves(strided)))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert len(expected) == len(inputs.leaves()) + 2


def test_scale_reaches_every_branch_and_the_ranking():
    inputs = small(LENGTHS, kind="mean", qk_dim=4)
    default = attend(inputs, RANKED, "triton")
    inputs = inputs._replace(q=(inputs.q / 2).detach().requires_grad_())
    doubled = evaluate(lambda x: triton_attention(x, RANKED, scale=1.0), inputs)  # twice 1 / sqrt(4), rounds nothing
    assert torch.equal(doubled["out"], default["out"])
    assert torch.equal(doubled["block_indices"], default["block_indices"])
    assert torch.equal(doubled["d q"], 2 * default["d q"])
    assert default["d q"].any()


@pytest.mark.parametrize("name", every(PACKINGS))
def test_compress_on_every_packing(name):
    def stage(backend, x):
        return {"summary": backend.compress(x.compress_k, x.cu_seqlens, SMALL, x.k_weights)}

    for kind in ("mean", "mlp"):
        compared = compare(stage, problem(name, kind=kind))
        assert ("summary" in compared) == any(length >= 4 for length in PACKINGS[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["mean", "linear", "mlp"])
def test_compress_of_every_kind_and_geometry(kind, dtype):
    for config in GEOMETRIES.values():
        l, d = config.compress_block_size, config.compress_stride  # noqa: E741
        inputs = random_inputs([l - 1, 2 * l + d + 1, 1, l], config, kind=kind, qk_dim=24, v_dim=8, dtype=DTYPES[dtype])
        compared = compare(
            lambda backend, x, c=config: {"summary": backend.compress(x.compress_k, x.cu_seqlens, c, x.k_weights)},
            inputs,
        )
        assert {"summary", "d compress_k"} <= compared


def attention(stage: str, inputs: Inputs, config: NSAConfig):
    """Forward of one branch as a function of a backend and of inputs like these, on blocks that nobody ranked."""
    blocks = random_blocks(inputs, config)

    @torch.no_grad()
    def attended(backend, x: Inputs) -> Values:
        offsets = x.cu_seqlens
        if stage == "compressed":
            o, lse = backend.compressed_attention(x.q, *summaries(x, config), offsets, config)
        elif stage == "selected":
            o, lse = backend.selected_attention(x.q, x.k, x.v, blocks, offsets, config)
        else:
            window = config if backend is kernels else config.window_size
            o, lse = backend.sliding_attention(x.q, x.sliding_k, x.sliding_v, offsets, window)
        return {"o": o, "lse": lse.float()}

    return attended


@pytest.mark.parametrize("name", every(PACKINGS))
@pytest.mark.parametrize("stage", ["compressed", "selected", "sliding"])
def test_each_attention_on_every_packing(name, stage):
    inputs = problem(name, kind="mean")
    compared = compare(attention(stage, inputs, SMALL), inputs)
    assert ("o" in compared) == (stage != "compressed" or any(length >= 4 for length in PACKINGS[name]))


@pytest.mark.parametrize("stage", ["compressed", "selected", "sliding"])
def test_each_attention_in_half_precision(stage):
    inputs = problem("twice_the_reach", torch.float16, kind="mean", num_heads=7, qk_dim=24, v_dim=8)
    assert {"o", "lse"} <= compare(attention(stage, inputs, SMALL), inputs)


def compare_gradients(inputs: Inputs, config: NSAConfig) -> set[str]:
    """The joint backward of all branches, on blocks that nobody ranked."""
    blocks = random_blocks(inputs, config)
    actual, plain = (attend(inputs, config, backend, blocks) for backend in ("triton", "eager"))
    truth = attend(inputs.to(dtype=torch.float64), config, "reference", blocks)
    return assert_strays_at_most_twice_as_far(actual, plain, truth, EPSILON[inputs.q.dtype])


@pytest.mark.parametrize("name", every(PACKINGS))
def test_gradients_of_every_branch_on_every_packing(name):
    assert {"d v", "d sliding_v", "d gates"} <= compare_gradients(problem(name, kind="mean"), SMALL)


def test_gradients_of_every_branch_in_half_precision():
    inputs = problem("twice_the_reach", torch.float16, kind="mean", num_heads=7, qk_dim=24, v_dim=8)
    compared = compare_gradients(inputs, SMALL)
    assert len(compared) == len(inputs.leaves()) + 2


@pytest.mark.parametrize("branch", [0, 1, 2], ids=["compressed", "selected", "sliding"])
def test_gradients_of_one_branch_alone(branch):
    """Nothing of the others covers an error; their keys and values have no gradient."""
    inputs = small(LENGTHS, kind="mean")
    gates = torch.zeros_like(inputs.gates)
    gates[..., branch] = 1
    inputs = inputs._replace(gates=gates.requires_grad_())
    compared = compare_gradients(inputs, RANKED)
    pairs = [{"d compress_k", "d compress_v"}, {"d k", "d v"}, {"d sliding_k", "d sliding_v"}]
    assert {"d q", "d gates"} <= compared
    assert [pair <= compared for pair in pairs] == [index == branch for index in range(3)]


def assert_chooses_the_blocks_of_the_reference(inputs: Inputs, config: NSAConfig) -> int:
    """Both rank from the same keys, and from the float64 log-sum-exp; returns the rows that were ranked."""
    exact = inputs.to(dtype=torch.float64)
    keys, values = summaries(exact, config)
    _, lse = reference.compressed_attention(exact.q, keys, values, exact.cu_seqlens, config)
    importance = reference.block_importance(exact.q, keys, lse, exact.cu_seqlens, config)
    expected = reference.block_selection(exact.q, keys, lse, exact.cu_seqlens, config)
    actual = kernels.block_selection(inputs.q, summaries(inputs, config)[0], lse.float(), inputs.cu_seqlens, config)
    assert actual.dtype == torch.int32
    assert assert_same_blocks(actual, expected, importance, tolerance=1e-5) <= len(inputs.q) // 50
    return ranked_rows(inputs, config)


@pytest.mark.parametrize("name", every(PACKINGS))
def test_block_selection_on_every_packing(name):
    ranked = assert_chooses_the_blocks_of_the_reference(problem(name, kind="mean"), SMALL)
    assert (ranked > 0) == (max(PACKINGS[name]) > SMALL.selected_tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_block_selection_for_other_geometries(name, dtype):
    config = GEOMETRIES[name]
    lengths = [config.selected_tokens + 40, 1, config.selected_tokens + 2]
    heads = {"num_heads": 6, "num_kv_heads": 2} if dtype == "float16" else {}
    inputs = small(lengths, config, kind="mean", dtype=DTYPES[dtype], **heads)
    assert assert_chooses_the_blocks_of_the_reference(inputs, config) == 42


def test_ties_go_to_the_lower_index():
    q, keys, offsets = torch.zeros(96, 2, 8), torch.randn(48, 1, 8), cu_seqlens([96])
    _, lse = eager.compressed_attention(q, keys, keys, offsets, SMALL)
    expected, actual = (backend.block_selection(q, keys, lse, offsets, SMALL) for backend in (reference, kernels))
    assert torch.equal(actual, expected)
    assert actual[-1, 0].tolist() == [0, 1, 10, 11]


def test_float32_chooses_the_blocks_of_float64_save_for_ties():
    inputs = small([110, 3, 61], SMALL, dtype=torch.float64)
    summary = reference.compress(inputs.compress_k, inputs.cu_seqlens, SMALL, inputs.k_weights)
    summary = apply_rotary(summary, *inputs.compressed_rotary)
    _, lse = reference.compressed_attention(inputs.q, summary, summary, inputs.cu_seqlens, SMALL)
    importance = reference.block_importance(inputs.q, summary, lse, inputs.cu_seqlens, SMALL)
    expected = reference.block_selection(inputs.q, summary, lse, inputs.cu_seqlens, SMALL)
    with torch.no_grad():
        actual = triton_attention(inputs.to(dtype=torch.float32), SMALL)["block_indices"]
    assert assert_same_blocks(actual, expected, importance, tolerance=1e-5) <= 2
    assert ranked_rows(inputs, SMALL) > 100
