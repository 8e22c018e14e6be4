"""The private parts of torch and Triton that the estimate uses are there and do what is relied on."""

import gc
import weakref

import pytest
import torch

from nsa_lightning.memory import compat


@torch.library.custom_op("nsa_lightning_test::twice", mutates_args=())
def twice(x: torch.Tensor, times: int) -> torch.Tensor:
    """Twice, so many times; its fake has another shape."""
    for _ in range(times):
        x = x * 2
    return x.clone()


@twice.register_fake
def _(x, times):
    return x.new_empty(77)


class Calls(compat.TorchDispatchMode):
    """Runs the Python of the operator above, and notes every operator."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(compat.schema_name(func))
        if func.namespace == "nsa_lightning_test":
            with self:
                return compat.call_implementation(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def test_a_custom_operators_own_python_runs_on_tensors_without_numbers():
    with compat.FakeTensorMode(), Calls() as calls:
        x = torch.empty(3)
        out = torch.ops.nsa_lightning_test.twice(x, 2)
    assert out.shape == (3,)
    expected = {"aten::empty": 1, "nsa_lightning_test::twice": 1, "aten::mul": 2, "aten::clone": 1}
    assert {name: calls.names.count(name) for name in expected} == expected


def test_the_name_of_an_operator_is_without_its_overload():
    assert compat.schema_name(torch.ops.aten.sort.stable) == "aten::sort"
    assert compat.schema_name(torch.ops.aten.sort.default) == "aten::sort"


@pytest.mark.parametrize("fake", [False, True])
def test_tensors_of_one_storage_have_its_key_and_the_storage_tells_when_it_is_gone(fake):
    with compat.FakeTensorMode() if fake else torch.device("cpu"):
        x, other, gone = torch.empty(4, 2), torch.empty(4, 2), []
        view = x.T[1:]
        key = compat.storage_key(x.untyped_storage())
        reference = weakref.ref(x.untyped_storage(), gone.append)
        assert compat.storage_key(view.untyped_storage()) == key != compat.storage_key(other.untyped_storage())
        del x
        gc.collect()
        assert not gone and reference() is not None  # noqa: PT018
        del view
        gc.collect()
    assert len(gone) == 1


def test_reading_a_number_that_is_not_there_is_told_apart():
    with compat.FakeTensorMode(), pytest.raises(compat.DataDependentOutputException):
        torch.empty(3).sum().item()


def test_tensors_in_nested_results_are_visited_and_nothing_else():
    seen = []
    compat.tree_map_only(torch.Tensor, seen.append, ([torch.ones(1)], {"a": (torch.ones(2), 3, None)}))
    assert [len(tensor) for tensor in seen] == [1, 2]


def test_a_gpu_is_pretended_and_forgotten():
    before = torch.ones(1).is_cuda
    with compat.pretended_gpu((9, 0), 132):
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_properties(0).multi_processor_count == 132
        assert torch.ones(1).is_cuda and torch.nn.Parameter(torch.ones(1)).is_cuda  # noqa: PT018
    assert torch.ones(1).is_cuda is before is False


def test_kernels_are_not_launched_within_and_are_again_afterwards():
    pytest.importorskip("triton")
    import triton
    from triton.runtime.jit import JITFunction, KernelInterface

    launched, usual = [], KernelInterface.__getitem__

    @triton.jit
    def kernel(x):
        pass

    function = JITFunction(kernel.fn)
    function.run = lambda *args, **options: launched.append(args)
    before = triton.knobs.runtime.interpret
    with compat.without_launches():
        assert triton.knobs.runtime.interpret is False
        assert function[(1,)](torch.ones(3)) is None
        assert not launched
    assert KernelInterface.__getitem__ is usual
    assert triton.knobs.runtime.interpret is before
    function[(1,)](torch.ones(3))
    assert len(launched) == 1
