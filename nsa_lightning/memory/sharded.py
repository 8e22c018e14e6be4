"""What FSDP2 allocates beside the shards: gathered weights, and what gradients pass through on their way to them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nsa_lightning.memory.meter import MemoryMeter
from nsa_lightning.memory.settings import StepSettings
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.sharding import shard_dimension

GATHERED, REDUCTION = "gathered weights", "reduction of gradients"


def shard_shape(parameter: Tensor, ranks: int) -> torch.Size:
    """Shape of the largest rank's part."""
    dim = shard_dimension(parameter, ranks)
    shape = list(parameter.shape)
    shape[dim] = math.ceil(shape[dim] / ranks)
    return torch.Size(shape)


class _Unit:
    """Parameters that are gathered and reduced together."""

    def __init__(self, whole: Sequence[nn.Parameter], shards: Sequence[nn.Parameter], ranks: int) -> None:
        self.whole, self.shards = whole, shards
        self.padded = ranks * sum(shard.numel() for shard in shards)  # elements
        self.gathered = self.padded * whole[0].element_size()
        self.reduced = self.padded * torch.float32.itemsize


class ShardedUnits:
    """Charges the meter as FSDP2 allocates and frees: a block is one unit, all the rest the root's.

    A gathering's output is copied into the weights. In forward it is kept until the next one has begun, in backward
    that of the next block is asked for ahead. A reduction's input is kept until the next reduction.
    """

    def __init__(self, model: Transformer, shards: Transformer, settings: StepSettings, meter: MemoryMeter) -> None:
        self.meter, self.settings = meter, settings
        ranks = settings.world_size
        self.blocks = [
            _Unit(list(block.parameters()), list(shard.parameters()), ranks)
            for block, shard in zip(model.layers, shards.layers, strict=True)
        ]
        inner = {parameter for unit in self.blocks for parameter in (*unit.whole, *unit.shards)}
        whole, shard = ([p for p in side.parameters() if p not in inner] for side in (model, shards))
        self.root = _Unit(whole, shard, ranks)
        self._output = self._input = 0  # bytes of the gathering and of the reduction that are kept
        if settings.accumulates and not settings.reduce_every_batch:
            for unit in (self.root, *self.blocks):
                meter.charge(REDUCTION, unit.reduced)
        model.register_forward_pre_hook(lambda *_: self._gather(self.root))
        model.register_forward_hook(lambda *_: self._keep_output(0))
        model.norm.register_full_backward_pre_hook(lambda *_: self._ask(len(self.blocks) - 1))
        for index, block in enumerate(model.layers):
            block.register_forward_pre_hook(lambda *_, unit=self.blocks[index]: self._gather(unit))
            block.register_forward_hook(lambda *_, unit=self.blocks[index]: self._free(unit))
            block.register_full_backward_pre_hook(lambda *_, index=index: self._gather_again(index))
            block.register_full_backward_hook(lambda *_, unit=self.blocks[index]: self._reduce(unit))

    def end_backward(self) -> None:
        """Reduce the root's gradients, and free the last buffers."""
        self._reduce(self.root)
        self._keep_input(0)

    def _gather(self, unit: _Unit) -> None:
        output = unit.gathered if self.settings.world_size > 1 else 0
        self.meter.charge(GATHERED, output)
        self.meter.charge(GATHERED, -self._output)
        self.meter.charge(GATHERED, unit.gathered)
        self._output = output

    def _free(self, unit: _Unit) -> None:
        if self.settings.reshard_after_forward:
            self.meter.charge(GATHERED, -unit.gathered)

    def _ask(self, index: int) -> None:
        """Begin the gathering of a block, ahead of its backward."""
        ahead = index >= 0 and self.settings.reshard_after_forward and self.settings.world_size > 1
        self._keep_output(self.blocks[index].gathered if ahead else 0)

    def _gather_again(self, index: int) -> None:
        if self.settings.reshard_after_forward:
            self.meter.charge(GATHERED, self.blocks[index].gathered)
        self._ask(index - 1)

    def _reduce(self, unit: _Unit) -> None:
        """Gradients of the whole weights become the shards' gradients."""
        settings = self.settings
        self.meter.charge(GATHERED, -unit.gathered)
        self._keep_input(unit.reduced)
        for parameter in unit.whole:
            parameter.grad = None
        if settings.accumulates and not settings.reduce_every_batch:
            self.meter.charge(REDUCTION, -unit.reduced)
        if not settings.cpu_offload:
            with self.meter.counting_as("gradients"):
                for shard in unit.shards:
                    shard.grad = torch.empty_like(shard)

    def _keep_output(self, size: int) -> None:
        self.meter.charge(GATHERED, -self._output)
        self.meter.charge(GATHERED, size)
        self._output = size

    def _keep_input(self, size: int) -> None:
        self.meter.charge(REDUCTION, -self._input)
        self.meter.charge(REDUCTION, size)
        self._input = size
