"""The private parts of torch that benchmarks use are there and do what is relied on."""

import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from nsa_lightning.benchmark.compat import profiled_events


def test_torchs_profiler_has_names_and_times_of_what_ran_on_a_device():
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("work"):
        time.sleep(0.02)
        torch.ones(3).sort()
    events = dict(profiled_events(profiled, DeviceType.CPU))
    (outer, outer_end), (start, end) = events["work"], events["aten::sort"]
    assert outer <= start <= end <= outer_end
    assert 20e6 < outer_end - outer < 60e9
    assert profiled_events(profiled, DeviceType.CUDA) == []
