"""The private parts of torch that the model uses are there and do what is relied on."""

import inspect

import pytest
import torch
from torch import distributed
from torch.distributed._functional_collectives import all_to_all_single
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_lightning.model import compat


class Names(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(compat.operator_name(func))
        return func(*args, **(kwargs or {}))


def test_torch_names_the_operators_that_a_mode_intercepts():
    with Names() as names:
        torch.ones(3).sort(stable=True)
    assert names.seen == ["aten::ones", "aten::sort.stable"]
    assert compat.operator_name(torch.ops.higher_order.cond) == ""
    assert compat.operator_name(torch.sort) == ""


@pytest.fixture
def group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_torch_exchanges_tensors_in_a_group_that_is_named(group):
    tensors = [torch.arange(6.0).view(1, 2, 3), torch.ones(1, 4)]
    sent = compat.all_to_all(tensors, group.group_name)
    assert all(type(x) is torch.Tensor for x in sent)
    assert all(torch.equal(x, y) for x, y in zip(sent, tensors, strict=True))
    assert sent[0].data_ptr() != tensors[0].data_ptr()
    names = list(inspect.signature(all_to_all_single).parameters)
    assert names[:4] == ["self", "output_split_sizes", "input_split_sizes", "group"]
