"""What a training step takes on each GPU: a few blocks are simulated, the others are like them."""

from typing import NamedTuple

import torch

from nsa_lightning.memory.meter import Peak, Place
from nsa_lightning.memory.settings import StepSettings
from nsa_lightning.memory.step import SimulatedStep, StepMemory
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.strategy import check_context_parallel


class MemoryEstimate(NamedTuple):
    """Memory of one GPU, bytes, as `torch.cuda.max_memory_allocated` counts it."""

    num_parameters: int  # of the whole model
    num_layers: int
    peaks: dict[Place, Peak]  # in the order of the step
    host: int  # parameters, gradients and optimizer state in host memory

    @property
    def worst(self) -> tuple[str, Peak]:
        """Where in the step most is alive, and what."""
        place, peak = max(self.peaks.items(), key=lambda item: item[1].total)
        return place.named(self.num_layers), peak

    @property
    def by_stage(self) -> dict[str, int]:
        """The peaks of forward, loss, backward and optimizer step."""
        stages: dict[str, int] = {}
        for place, peak in self.peaks.items():
            stage = place.what.split()[0]
            stages[stage] = max(stages.get(stage, 0), peak.total)
        return stages


def estimate_memory(module: LanguageModel, settings: StepSettings) -> MemoryEstimate:
    """Simulate a step of a deep decoder with two small numbers of blocks: each block more adds the same at each place.

    Args:
        module: settles the decoder's sizes, the optimizer and the loss; its decoder is replaced.
        settings: the run's.

    Raises:
        ValueError: a size that the model does not take or GPUs cannot share, or Triton is not installed.
    """
    config = module.transformer_config
    shape = (settings.seq_len, settings.batch_size)
    check_context_parallel(settings.context_parallel_size, settings.world_size, config.num_kv_heads, shape)
    period = len(config.attention)
    edge = period + 1  # the first block's neighbour is like no other: it asks for no weights but the first block's
    few = -(-2 * edge // period) * period
    if config.num_layers <= few + period:
        memory = SimulatedStep(module, settings, config.num_layers, edge).run()
    else:
        small, large = (SimulatedStep(module, settings, layers, edge).run() for layers in (few, few + period))
        memory = _extrapolated(small, large, (config.num_layers - few) // period)
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in Transformer(config).parameters())
    return MemoryEstimate(num_parameters, config.num_layers, *memory)


def _extrapolated(small: StepMemory, large: StepMemory, steps: int) -> StepMemory:
    """`small` with `steps` times what `large` has more."""

    def reach(a: int, b: int) -> int:
        return a + (b - a) * steps

    peaks = {}
    for place, before in small.peaks.items():
        after = large.peaks[place]
        kinds = {
            kind: reach(before.kinds.get(kind, 0), after.kinds.get(kind, 0))
            for kind in dict.fromkeys((*before.kinds, *after.kinds))
        }
        peaks[place] = Peak(reach(before.total, after.total), kinds)
    return StepMemory(peaks, reach(small.host, large.host))
