"""The choice of kernels: what a plan names, why, and that the launches are those it names. No GPU is needed."""

import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from nsa_kernels import NSAConfig, SettingError, native_sparse_attention, plan
from nsa_kernels.backends import Plan, Stages, _choose, _Inputs, elementwise_implementation, readable
from nsa_kernels.decode.attention import chunk_attention
from torch._subclasses import FakeTensorMode

triton = pytest.importorskip("triton")
for name in (
    "run_attention",
    "run_gradients",
    "block_attention",
    "block_gradients",
    "query_gradient",
):  # interpreted or not from their import on
    pytest.importorskip(f"nsa_kernels.hopper.{name}")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ATTENTION = ("compressed_attention", "selected_attention", "sliding_attention")
GRADIENTS = ("query_gradient", "compressed_gradient", "selected_gradient", "sliding_gradient")


@pytest.fixture
def gpu(monkeypatch):
    """Within, CPU tensors pass for those of a GPU of some compute capability, and Triton interprets nothing."""

    @contextmanager
    def pretend(*capability: int) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "is_cuda", True)
            patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
            properties = SimpleNamespace(multi_processor_count=132)
            patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
            patch.setattr(triton.knobs.runtime, "interpret", False)
            yield

    return pretend


@pytest.fixture
def launches(monkeypatch):
    """The kernels that would be launched, as (folder, name); nothing is."""
    names = []

    def note(kernel, grid):
        return lambda *_, **__: names.append((kernel.fn.__module__.split(".")[1], kernel.fn.__name__))

    monkeypatch.setattr("triton.runtime.jit.KernelInterface.__getitem__", note)
    return names


def tensors(H=16, H_kv=1, D_qk=128, D_v=128, dtype=BF16, T=300):
    return tuple(
        torch.zeros(T, heads, D, dtype=dtype, requires_grad=True) for heads, D in ((H, D_qk), (H_kv, D_qk), (H_kv, D_v))
    )


def made(config: NSAConfig | None = NSAConfig(), backend="auto", **sizes) -> Plan:  # noqa: B008 - frozen
    q, _, v = tensors(T=1, **sizes)
    return plan(q, v, config, backend)


def on_hopper(chosen: Plan) -> set[str]:
    assert set(chosen.stages) <= {"triton", "hopper"}
    return {name for name, implementation in chosen.stages._asdict().items() if implementation == "hopper"}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, {*ATTENTION, *GRADIENTS}),
        ({"dtype": FP16}, {*ATTENTION, *GRADIENTS}),
        ({"H": 8, "H_kv": 2}, {*ATTENTION, *GRADIENTS} - {"selected_gradient"}),
        ({"H": 4, "H_kv": 2}, {*ATTENTION, *GRADIENTS} - {"selected_attention", "selected_gradient"}),
        ({"D_qk": 64, "D_v": 64}, {"compressed_attention", *GRADIENTS}),
        ({"D_qk": 64}, {"compressed_attention", "sliding_attention", *GRADIENTS}),
        ({"H": 3}, {"compressed_attention", "sliding_attention", "compressed_gradient", "sliding_gradient"}),
        ({"dtype": FP32}, set()),
        ({"D_qk": 192}, set()),
        ({"D_v": 96}, set()),
    ],
    ids=lambda value: " ".join(sorted(value)) if isinstance(value, set) else str(value),  # the same in every process
)
def test_hopper_runs_the_stages_that_have_a_kernel_for_the_sizes(gpu, sizes, expected):
    with gpu(9, 0):
        chosen = made(**sizes)
    assert chosen.backend == "triton"
    assert on_hopper(chosen) == expected
    for name in (*ATTENTION, *GRADIENTS):
        assert getattr(chosen.reasons, name).startswith("hopper: ") == (name not in expected)
    assert {chosen.reasons.compress, chosen.reasons.block_selection, chosen.reasons.decoding} == {""}


def test_blocks_that_no_tile_of_hopper_fits_leave_it_the_branches_without_blocks(gpu):
    with gpu(9, 0):
        chosen = made(NSAConfig(select_block_size=32))
    assert on_hopper(chosen) == {
        "compressed_attention",
        "sliding_attention",
        "compressed_gradient",
        "sliding_gradient",
    }
    assert "select_block_size must be a multiple" in chosen.reasons.query_gradient


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_chips_run_triton(gpu, capability):
    with gpu(*capability):
        chosen = made()
    assert set(chosen.stages) == {"triton"}
    assert chosen.reasons.sliding_attention == "hopper: the kernels are for compute capability 9 alone"


@pytest.mark.parametrize(
    ("capability", "sizes", "config", "reason"),
    [
        ((7, 5), {}, NSAConfig(), "the kernels need an Ampere GPU"),
        ((9, 0), {}, NSAConfig(select_block_size=48), "select_block_size must be a power of two from 16 on, got 48"),
        ((9, 0), {"D_v": 260}, NSAConfig(), "head dimension of v must be a multiple of 8 up to 256 .*, got 260"),
        ((9, 0), {"dtype": torch.float64}, NSAConfig(), "q, k and v must share one dtype"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_take_runs_on_eager_with_a_warning_and_is_refused_where_they_are_demanded(
    gpu, capability, sizes, config, reason
):
    with gpu(*capability):
        with pytest.warns(UserWarning, match=f"runs on the slow eager backend, .*{reason}"):
            chosen = made(config, **sizes)
        with pytest.raises(SettingError, match=f"backend triton does not take these inputs: .*{reason}"):
            made(config, "triton", **sizes)
    assert set(chosen.stages) == {chosen.backend} == {"eager"}
    assert len(set(chosen.reasons)) == 1


def test_a_cpu_runs_eager_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = made()
        assert made(backend="eager").reasons.decoding == "backend eager was asked for"
        assert made(backend="reference").stages == Stages(*9 * ["reference"], "eager")
    assert set(chosen.stages) == {"eager"}
    assert chosen.reasons.compress == "there is no GPU, q is on cpu"


def test_a_plan_is_made_once_for_equal_inputs_and_does_not_outlive_the_device(gpu):
    with gpu(9, 0):
        first = made()
        assert made() is first
    with gpu(8, 0):
        assert on_hopper(made()) == set()
    assert made().backend == "eager"
    with pytest.raises(AttributeError):
        first.backend = "eager"


def test_a_description_has_a_line_for_each_stage_and_says_why(gpu):
    with gpu(9, 0):
        lines = made(H=8, H_kv=2).describe().splitlines()
    assert [line.split()[0] for line in lines] == list(Stages._fields)
    assert lines[1].split() == ["compressed_attention", "hopper"]
    assert lines[Stages._fields.index("selected_gradient")].split(maxsplit=2)[1:] == [
        "triton",
        "hopper: 8 rows are copied at once, a group of less than 8 heads has not as many",
    ]
    names = Stages(*map(str, range(10)))
    assert Stages.read(names.spelled) == names


CASES = [
    dict(zip(("H", "H_kv", "D_qk", "D_v"), sizes, strict=True))
    for sizes in (
        (16, 1, 128, 128),
        (8, 2, 128, 128),
        (4, 2, 128, 128),
        (16, 2, 64, 64),
        (3, 1, 64, 128),
        (9, 3, 80, 80),
    )
]


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_a_step_launches_what_its_plan_names(gpu, launches, capability, sizes):
    q, k, v = tensors(**sizes)
    gates, offsets = torch.zeros(*q.shape[:2], 3, dtype=BF16), torch.tensor([0, len(q)], dtype=torch.int32)
    blocks = torch.zeros(len(q), k.shape[1], 16, dtype=torch.int32)
    with gpu(*capability):
        names = plan(q, v, NSAConfig()).stages
        native_sparse_attention(q, k, v, gates, offsets, NSAConfig(), block_indices=blocks).out.sum().backward()
    found = {kernel: [room for room, name in launches if name == kernel] for _, kernel in launches}
    assert found["_forward_kernel"] == [names.compressed_attention, names.selected_attention, names.sliding_attention]
    assert found["_dq_kernel"] == [names.query_gradient]
    assert found["_dkv_kernel"] == [names.compressed_gradient, names.selected_gradient, names.sliding_gradient]
    assert set(found["_mean_kernel"]) == {names.compress}


@pytest.mark.parametrize("sizes", CASES, ids=str)
def test_a_chunk_of_a_prompt_launches_what_its_plan_names(gpu, launches, sizes):
    q, k, v = (x.detach() for x in tensors(**sizes))
    with gpu(9, 0):
        names = plan(q, v, NSAConfig()).stages
        chunk_attention(q, torch.zeros(*q.shape[:2], 3), k, v, k, v, k, v, NSAConfig())
    attention = [room for room, kernel in launches if kernel == "_forward_kernel"]
    assert attention == [names.compressed_attention, names.selected_attention, names.sliding_attention]


def test_a_plan_is_made_within_a_graph_that_takes_every_length():
    """No graph breaks at it, whatever the sizes are known to be."""
    graphs = []

    def counted(graph, _):
        graphs.append(graph)
        return graph

    def choose(q, v):
        heads, dims = (q.shape[-2], v.shape[-2]), (q.shape[-1], v.shape[-1])
        inputs = _Inputs("auto", True, "cuda", False, (9, 0), (q.dtype, v.dtype), heads, dims, 64)
        return q + 1, _choose(inputs)[0].stages.spelled

    torch.compiler.reset()
    compiled = torch.compile(choose, dynamic=True, fullgraph=True, backend=counted)
    for sizes in ({}, {"T": 700}, {"H": 4, "H_kv": 2, "D_qk": 64, "D_v": 64}, {"D_qk": 192}):
        q, _, v = (x.detach() for x in tensors(**sizes))
        assert compiled(q, v)[1] == choose(q, v)[1]
        assert len(graphs) == (1 if sizes in ({}, {"T": 700}) else len(graphs))
    assert len(graphs) == 3


def test_numbers_by_themselves_are_for_kernels_only_where_no_gradient_is_wanted(gpu):
    x, exact = torch.zeros(2, dtype=BF16), torch.zeros(2, dtype=torch.float64)
    for capability, wanted in itertools.product(((7, 5), (8, 0), (9, 0)), (False, True)):
        with gpu(*capability), torch.set_grad_enabled(wanted):
            expected = "eager" if wanted or capability < (8, 0) else "triton"
            assert elementwise_implementation(x) == expected
            assert elementwise_implementation(exact) == "eager"
    with torch.no_grad():
        assert elementwise_implementation(x) == "eager"


def test_only_numbers_that_are_at_hand_are_looked_at():
    with FakeTensorMode():
        assert not readable(torch.zeros(2))
    assert not readable(torch.zeros(2, device="meta"))
    assert readable(torch.zeros(2))
