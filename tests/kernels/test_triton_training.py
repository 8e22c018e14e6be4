"""What training asks of the Triton kernels beside the right numbers, under Triton's interpreter on the CPU.

Operators that the compiler and checkpointing understand, little memory, equal gradients in every run, clear errors.
"""

import functools
from dataclasses import replace

import pytest
import torch
from nsa_kernels import native_sparse_attention, plan
from nsa_kernels.packing import batch_layout
from support.measured import assert_strays_at_most_twice_as_far, attend, evaluate
from support.packings import PACKINGS, SMALL, random_inputs
from support.recorder import OperatorRecorder
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

kernels = pytest.importorskip("support.kernels", exc_type=ImportError)
primitives = pytest.importorskip("nsa_kernels.triton.primitives", exc_type=ImportError)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU")

RANKED = replace(SMALL, select_block_size=4)
LENGTHS = [3, 20, 1]


def small(lengths=LENGTHS, config=RANKED, **options):
    sizes = {"num_heads": 2, "num_kv_heads": 1, "qk_dim": 8, "v_dim": 4, "dtype": torch.float32}
    return random_inputs(lengths, config, **(sizes | options))


def with_layout(inputs):
    """The operator as a function of inputs like these, whose layout is made beforehand."""
    layout = batch_layout(inputs.cu_seqlens, len(inputs.q), RANKED)
    return functools.partial(run, layout=layout)


def run(inputs, **options):
    return native_sparse_attention(**inputs._asdict(), config=RANKED, backend="triton", **options)._asdict()


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
    assert all(value.any() for value in expected.values())


@functools.cache
def recorded_calls():
    """The arguments of each operator as a step calls it."""
    with OperatorRecorder() as recorder:
        evaluate(run, small([3, 9], kind="linear"))
    return dict(recorder.calls)


DIFFERENTIABLE = ["block_mean", "block_linear", "gated_branches"]
OPERATORS = [*DIFFERENTIABLE, *(f"{name}_backward" for name in DIFFERENTIABLE), "compressed_attention",
             "block_selection"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_rules_of_torch_library(name):
    operator = getattr(torch.ops.nsa_kernels, name).default
    differentiable = name in DIFFERENTIABLE
    arguments = torch.utils._pytree.tree_map_only(
        torch.Tensor,
        lambda x: x.detach().clone().requires_grad_(x.requires_grad and differentiable),
        recorded_calls()[operator],
    )
    outcome = torch.library.opcheck(operator, arguments)
    assert set(outcome.values()) == {"SUCCESS"}


def test_no_operator_is_left_unchecked():
    registered = {
        name.removeprefix("nsa_kernels::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("nsa_kernels::")
    }
    assert registered == {operator.name().removeprefix("nsa_kernels::") for operator in recorded_calls()}
    assert registered == set(OPERATORS)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_in_one_graph_to_equal_results(compiler):
    inputs = small()
    function = with_layout(inputs)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert_equal(evaluate(compiled, inputs), evaluate(function, inputs))


def test_checkpointing_changes_nothing():
    inputs = small()
    function = with_layout(inputs)
    selection = torch.ops.nsa_kernels.block_selection.default
    with OperatorRecorder() as recorder:
        actual = evaluate(lambda x: checkpoint(function, x, use_reentrant=False), inputs)
    assert_equal(actual, evaluate(function, inputs))
    assert recorder.count(selection) == 2


def test_selective_checkpointing_saves_the_chosen_blocks():
    inputs = small()
    function = with_layout(inputs)
    selection = torch.ops.nsa_kernels.block_selection.default
    contexts = functools.partial(create_selective_checkpoint_contexts, [selection])
    with OperatorRecorder() as recorder:
        actual = evaluate(lambda x: checkpoint(function, x, use_reentrant=False, context_fn=contexts), inputs)
    assert_equal(actual, evaluate(function, inputs))
    assert recorder.count(selection) == 1
    assert recorder.count(torch.ops.nsa_kernels.gated_branches.default) == 2


@pytest.mark.slow
def test_backward_gives_equal_gradients_in_every_run():
    inputs = small()
    function = with_layout(inputs)
    assert_equal(evaluate(function, inputs), evaluate(function, inputs))
    out, leaves = function(inputs)["out"].square().sum(), list(inputs.leaves().values())
    first, second = (torch.autograd.grad(out, leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(grad.any() for grad in first)


def test_memory_for_backward_holds_inputs_and_branches_alone():
    """Every input, three outputs, the summaries, and a few numbers for each token and head or slot."""
    inputs = small([70, 26], v_dim=16, kind="mean", rotary=False)
    (T, H, _), (_, H_kv, D_v) = inputs.q.shape, inputs.v.shape
    layout = batch_layout(inputs.cu_seqlens, T, RANKED)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(inputs, layout=layout)
    tensors = sum(leaf.nbytes for leaf in inputs.leaves().values())
    outputs = 3 * 4 * T * H * D_v
    summaries = sum(x.nbytes for x in (inputs.k, inputs.v)) // RANKED.compress_stride
    lse, indices, where = 4 * T * 3 * H, 4 * T * H_kv * RANKED.num_selected_blocks, sum(x.nbytes for x in layout)
    assert where <= 4 * 14 * T
    total = sum(storage.nbytes() for storage in saved.values())
    assert total <= tensors + outputs + summaries + lse + indices + where
    assert inputs.q.untyped_storage().data_ptr() in saved
    assert len(saved) > 10


@pytest.mark.parametrize("shut", [0, 1, 2], ids=["compressed", "selected", "sliding"])
def test_a_gate_of_zero_takes_its_branch_out_and_has_a_gradient(shut):
    inputs = small()
    gates = inputs.gates.detach().clone()
    gates[..., shut] = 0
    gates[::5] = 0
    inputs = inputs._replace(gates=gates.requires_grad_())
    actual = attend(inputs, RANKED, "triton")
    blocks = actual["block_indices"]
    plain = attend(inputs, RANKED, "eager", blocks)
    truth = attend(inputs.to(dtype=torch.float64), RANKED, "reference", blocks)
    compared = assert_strays_at_most_twice_as_far(actual, plain, truth, 2e-6)
    assert not actual["out"][::5].any()
    assert not actual[("d compress_v", "d v", "d sliding_v")[shut]].any()
    assert actual["d gates"][-2, :, shut].all()
    assert {"out", "d q", "d gates"} <= compared


def test_gates_above_1_have_the_gradients_of_eager():
    inputs = small([3, 9], kind="mean")
    inputs = inputs._replace(gates=(7 * inputs.gates).detach().requires_grad_())
    actual = attend(inputs, RANKED, "triton")
    plain = attend(inputs, RANKED, "eager", actual["block_indices"])
    truth = attend(inputs.to(dtype=torch.float64), RANKED, "reference", actual["block_indices"])
    assert {"d q", "d v"} <= assert_strays_at_most_twice_as_far(actual, plain, truth, 2e-6)
    assert (inputs.gates > 1).any()


def test_gates_of_any_sign_have_the_gradients_of_eager():
    inputs = small([3, 9], kind="mean")
    gates = 4 * inputs.gates.detach() - 2
    gates[5, 1, 2] = 0.0
    inputs = inputs._replace(gates=gates.requires_grad_())
    actual = attend(inputs, RANKED, "triton")
    plain = attend(inputs, RANKED, "eager", actual["block_indices"])
    truth = attend(inputs.to(dtype=torch.float64), RANKED, "reference", actual["block_indices"])
    assert {"d q", "d v", "d gates"} <= assert_strays_at_most_twice_as_far(actual, plain, truth, 2e-6)
    assert (gates < 0).any()
    assert (gates > 0).any()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "separate"), [("mean", False), ("linear", True), ("mlp", True)])
def test_one_graph_takes_every_length(kind, separate):
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compiler.reset()
    compiled = torch.compile(lambda x: run(x)["out"], dynamic=True, fullgraph=True, backend=counted)
    for lengths in ([3, 3, 3, 3], [1, 7, 2, 4]):
        inputs = small(lengths, kind=kind, separate=separate)
        out = compiled(inputs)
        gradients = torch.autograd.grad(out.sum(), list(inputs.leaves().values()), materialize_grads=True)
        assert all(gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(out, run(inputs)["out"])
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_documents_without_a_visible_block_give_zeros(dtype):
    inputs = small(PACKINGS["all_shorter_than_a_compress_block"], v_dim=8, dtype=dtype)
    keys, values = (torch.randn(4, 1, 8).to(dtype) for _ in range(2))
    o, lse = kernels.compressed_attention(inputs.q, keys, values, inputs.cu_seqlens, RANKED)
    assert torch.equal(o, torch.zeros_like(o))
    assert torch.equal(lse, torch.zeros_like(lse))
    alone = torch.zeros_like(inputs.gates)
    alone[..., 0] = 1
    compressed = attend(inputs._replace(gates=alone.requires_grad_()), RANKED, "triton")
    assert not any(value.any() for name, value in compressed.items() if name not in ("block_indices", "d gates"))
    whole = attend(inputs, RANKED, "triton")
    assert all(value.isfinite().all() for value in whole.values())
    assert not whole["d compress_k"].any()
    assert whole["out"].all()


@pytest.mark.parametrize(("precision", "expected"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_is_rounded_to_tf32_only_where_pytorch_is_told_to(precision, expected):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert primitives.dot_precision(torch.float32) == expected
        assert {primitives.dot_precision(dtype) for dtype in (torch.float16, torch.bfloat16)} == {"ieee"}
    finally:
        torch.set_float32_matmul_precision(before)
    assert primitives.dot_precision(torch.float32) == "ieee"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": torch.float64}, r"q, k and v must share one dtype of .*float16.*, got torch.float64"),
        ({"dtype": torch.bfloat16}, "interpreter computes bfloat16 wrongly"),
        ({"dtype": torch.float16, "qk_dim": 12}, "head dimension of k must be a multiple of 8 up to 256 .*, got 12"),
        ({"dtype": torch.float16, "v_dim": 20}, "head dimension of v must be a multiple of 8 up to 256 .*, got 20"),
        ({"v_dim": 6}, "head dimension of v must be a multiple of 4 up to 256 .*, got 6"),
        ({"qk_dim": 260}, "head dimension of k must be a multiple of 4 up to 256 .*, got 260"),
    ],
)
def test_inputs_that_the_kernels_do_not_take_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(small([5], kind="mean", **options))


@pytest.mark.parametrize("scale", [-0.5, 0.0, float("nan")])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match=f"scale must be positive, got {scale}"):
        run(small([5], kind="mean"), scale=scale)


def test_keys_of_another_dtype_are_refused():
    inputs = small([5], kind="mean")
    with pytest.raises(ValueError, match=r"q, k and v must share one dtype of .*, got .*float32"):
        run(inputs._replace(sliding_k=inputs.sliding_k.half()))


def test_auto_stays_eager_on_the_cpu():
    inputs = small([5])
    assert plan(inputs.q, inputs.v, SMALL).backend == "eager"
    assert plan(inputs.q, inputs.v, SMALL, "triton").backend == "triton"
