"""Settings that every test runs under."""

import os
from importlib.util import find_spec

import pytest
from support.cpu_times import (  # noqa: F401 - hooks of pytest
    pytest_addoption,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_terminal_summary,
)
from support.plain_environment import VARIABLE, hide_development_packages

if os.environ.get(VARIABLE) == "1":
    hide_development_packages()  # before anything is imported that looks for them
elif find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("suite", deadline=None)  # how long an example takes depends on what else runs
    settings.load_profile("suite")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read as Triton is imported, which no test has done yet

with torch.device("cpu"):
    torch.empty(0)  # device contexts list the functions they change at their first use: before these are patched below


def pytest_collection_modifyitems(items):
    long = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in long)  # files that take long first, so that workers end together
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread_a_worker():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _gpu_memory_is_given_back():
    """The workers of a run share one GPU."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch):
    """`torch.empty` and its kin hand out NaN, so that a value nobody wrote is seen."""

    def poisoned(create):
        def call(*args, **kwargs):
            out = create(*args, **kwargs)
            if out.is_floating_point() and not out.is_meta:
                out.detach().fill_(float("nan"))
            return out

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
