"""CUDA graphs: the launches of a call are recorded once and replayed as one."""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch

_Result = TypeVar("_Result")

_WARM_UPS = 3  # runs before a capture, in which kernels are compiled and libraries allocate what they keep


class CapturedCall(NamedTuple, Generic[_Result]):
    """A call on the GPU without its Python."""

    graph: torch.cuda.CUDAGraph
    result: _Result

    def replay(self) -> _Result:
        """Run it on the current stream; its result stands where that of the last replay stood."""
        self.graph.replay()
        return self.result


@torch.inference_mode()
def capture(call: Callable[[], _Result], forget: Callable[[], object] = lambda: None) -> CapturedCall[_Result]:
    """Record a call on the current GPU.

    Args:
        call: reads and writes tensors that keep their addresses; runs a few times before.
        forget: takes back what a call leaves behind.
    """
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            call()
            forget()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    forget()
    return CapturedCall(graph, result)
