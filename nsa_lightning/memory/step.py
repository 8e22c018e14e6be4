"""One training step on tensors without numbers: what is alive when, on one GPU of a run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nsa_kernels.errors import SettingError
from torch import Tensor, nn
from torch.optim import Optimizer

from nsa_lightning.data.batch import PackedBatch
from nsa_lightning.memory.compat import DataDependentOutputException
from nsa_lightning.memory.meter import PARAMETERS, MemoryMeter, Peak, Place
from nsa_lightning.memory.settings import StepSettings
from nsa_lightning.memory.sharded import REDUCTION, ShardedUnits, shard_shape
from nsa_lightning.memory.simulated_gpu import DEVICE, simulated_gpu
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.distillation import Teacher
from nsa_lightning.training.module import LanguageModel
from nsa_lightning.training.optimizer import parameter_groups

OPTIMIZER_STATE, GRADIENTS, LIBRARIES = "optimizer state", "gradients", "cuBLAS workspaces"
TEACHER = "teacher"

_CUBLAS_WORKSPACE = 32 * 2**20
"""What PyTorch gives cuBLAS on Hopper, in forward and in backward each; 8 MiB on other GPUs."""

_SCOPES = {"self_attn": "attention", "mlp": "feed-forward"}
"""What the activations of a block's modules count as; all others are the residual stream's."""


class StepMemory(NamedTuple):
    """What one GPU and its process hold."""

    peaks: dict[Place, Peak]  # in the order of the step
    host: int  # bytes of parameters, gradients and optimizer state in host memory


class SimulatedStep:
    """The step that costs most, after the first: optimizer state is there, and gradients until they are set to none.

    Args:
        module: settles the decoder's sizes, the optimizer and the loss; its decoder becomes one without numbers.
        settings: of the run.
        num_layers: decoder blocks, in place of the configured number.
        edge: blocks at each end whose peaks are told apart.
    """

    def __init__(self, module: LanguageModel, settings: StepSettings, num_layers: int, edge: int) -> None:
        self.module, self.settings, self.edge = module, settings, edge
        self.meter, self.host = MemoryMeter(DEVICE), MemoryMeter(DEVICE)
        config = replace(module.transformer_config, num_layers=num_layers)
        with torch.device("meta"):
            self.model = Transformer(config, module.activation_checkpointing)
        self.weights = self._kept(self.model)  # the optimizer's
        self.model.parallel = ContextParallel(size=settings.context_parallel_size)
        self.teacher: Teacher | None = None
        if module.distillation.teacher is not None:
            directory = Path(module.distillation.teacher)
            self.teacher = Teacher.without_weights(directory, settings.compute_dtype)
            self.teacher_weights = self._kept(self.teacher.model)
            self.teacher.model.parallel = self.model.parallel

    def _kept(self, model: Transformer) -> Transformer:
        """Where the weights of a model on the meta device are kept: a model of shards, or itself."""
        if self.settings.strategy != "fsdp2":
            return model
        with torch.device("meta"):
            return Transformer(model.config)

    def run(self) -> StepMemory:
        """The peak at every place of the step.

        Raises:
            ValueError: a GPU would run attention document by document, or Triton is not installed.
        """
        with simulated_gpu():
            self._make_weights()
            optimizer = self._make_state()
            host = self.host.total
            self.meter.peaks.clear()
            try:
                with self.meter:
                    self._step(optimizer)
            except DataDependentOutputException as error:
                nsa = self.module.transformer_config.nsa
                raise SettingError(
                    "attention must run on kernels for an estimate: nsa.backend auto or triton, nsa.select_block_size "
                    "a power of two from 16 on, head_dim a multiple of 8, full and sliding layers in bf16 or fp16, got "
                    f"nsa.backend={nsa.backend}, nsa.select_block_size={nsa.select_block_size}, "
                    f"head_dim={self.module.transformer_config.query_head_dim} in {self.settings.compute_dtype}"
                ) from error
        return StepMemory(self.meter.peaks, host)

    def _make_weights(self) -> None:
        settings = self.settings
        self._allocate(self.model, self.weights, settings.parameter_dtype, PARAMETERS)
        if self.teacher is not None:
            self._allocate(self.teacher.model, self.teacher_weights, settings.compute_dtype, TEACHER)

    def _allocate(self, model: Transformer, kept: Transformer, dtype: torch.dtype, kind: str) -> None:
        """Count what is kept; what is gathered of shards is charged as it comes and goes."""
        settings, sharded = self.settings, kept is not model
        with self._state_meter, self._state_meter.counting_as(kind):
            allocate(kept, dtype, lambda p: shard_shape(p, settings.world_size) if sharded else p.shape)
        if sharded:
            allocate(model, settings.compute_dtype, lambda parameter: parameter.shape)
            for parameter in model.parameters():
                self.meter.ignore(parameter)

    @property
    def _state_meter(self) -> MemoryMeter:
        """Counts where parameters and optimizer state are kept."""
        return self.host if self.settings.cpu_offload else self.meter

    def _make_state(self) -> Optimizer:
        """Gradients of the step before, and the state that it left."""
        meter = self._state_meter
        with meter:
            with meter.counting_as(GRADIENTS):
                for parameter in self.weights.parameters():
                    parameter.grad = torch.empty_like(parameter)
            optimizer = self.module.optimizer_callable(parameter_groups(self.weights))
            for group in optimizer.param_groups:
                if group.get("foreach", True) is None and not group.get("fused"):
                    group["foreach"] = True  # the default on a GPU, which is told by the tensors' type
            try:
                with meter.counting_as(OPTIMIZER_STATE):
                    optimizer.step()
            except DataDependentOutputException as error:
                name = type(optimizer).__name__
                raise SettingError(
                    f"model.optimizer must read no values in its step for an estimate, got {name}"
                ) from error
        return optimizer

    def _step(self, optimizer: Optimizer) -> None:
        settings, meter = self.settings, self.meter
        meter.place = Place("forward")
        units = self._hook_strategy()
        self._hook_places()
        with meter.counting_as("batch"):
            batch = _batch(settings)
        with meter.counting_as("residual stream"), self._autocast():
            self.module.model = self.model
            nats, _, output = self.module.summed_loss(batch, settings.watches)
            if self.teacher is not None:
                meter.place = Place("loss beside the teacher")
                with meter.counting_as(TEACHER):
                    nats = nats + self.teacher.divergence(self.model, output.hidden, batch)[0]
        del output
        if not settings.accumulates:
            for parameter in self.weights.parameters():
                parameter.grad = None
        meter.place = Place("backward of the loss")
        with meter.counting_as("backward"):
            nats.backward()
        if units is not None:
            units.end_backward()
        meter.place = Place("optimizer step")
        with meter.counting_as("optimizer step"):
            if not settings.cpu_offload:
                optimizer.step()

    def _hook_strategy(self) -> ShardedUnits | None:
        """Count what surrounds the model."""
        settings, meter = self.settings, self.meter
        hopper = torch.cuda.get_device_capability()[0] == 9
        meter.charge(LIBRARIES, 2 * (_CUBLAS_WORKSPACE if hopper else _CUBLAS_WORKSPACE // 4))
        for parameter in self.model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: meter.label(p.grad, GRADIENTS))
        if settings.strategy == "ddp" and not settings.bucket_view:
            meter.charge(REDUCTION, sum(p.numel() * p.element_size() for p in self.weights.parameters()))
        if settings.strategy != "fsdp2":
            return None
        if self.teacher is not None:  # nothing of it is reduced
            ShardedUnits(self.teacher.model, self.teacher_weights, replace(settings, accumulates=False), meter)
        return ShardedUnits(self.model, self.weights, settings, meter)

    def _autocast(self) -> AbstractContextManager[Any]:
        settings = self.settings
        if settings.strategy == "fsdp2" or settings.compute_dtype == settings.parameter_dtype:
            return nullcontext()
        return torch.autocast(DEVICE, settings.compute_dtype)

    def _hook_places(self) -> None:
        """Tell the meter where the step is and what it computes."""
        meter, last = self.meter, len(self.model.layers) - 1

        def enter(place: Place) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                meter.place = place

            return hook

        for index, block in enumerate(self.model.layers):
            layer = index if index < self.edge else max(index - last - 1, -self.edge - 1)
            block.register_forward_pre_hook(enter(Place("forward of layer", layer)))
            block.register_full_backward_pre_hook(enter(Place("backward of layer", layer)))
            for name, kind in _SCOPES.items():
                _count_module(block.get_submodule(name), kind, meter)
        self.model.layers[-1].register_forward_hook(enter(Place("loss")))
        self.model.layers[0].register_full_backward_hook(enter(Place("backward of the embedding")))
        self.model.norm.register_forward_hook(lambda *_: setattr(meter, "kind", "logits and loss"))


def allocate(model: nn.Module, dtype: torch.dtype, shape_of: Callable[[Tensor], torch.Size]) -> None:
    """Give the parameters of a model on the meta device memory; what was shared stays shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in made:
                data = torch.empty(shape_of(parameter), dtype=dtype)
                made[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            setattr(module, name, made[parameter])


def _batch(settings: StepSettings) -> PackedBatch:
    """Sequences of one document each."""
    tokens, targets, positions = (torch.empty(settings.batch_size * settings.seq_len, dtype=torch.int64) for _ in "123")
    cu_seqlens = torch.empty(settings.batch_size + 1, dtype=torch.int32)
    return PackedBatch(tokens, targets, positions, cu_seqlens, settings.seq_len, torch.empty((), dtype=torch.int64))


def _count_module(module: nn.Module, kind: str, meter: MemoryMeter) -> None:
    """Count what a module's forward allocates, also when backward computes it again."""
    outer: list[str] = []

    def enter(*_: Any) -> None:
        outer.append(meter.kind)
        meter.kind = kind

    def leave(*_: Any) -> None:
        meter.kind = outer.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave, always_call=True)  # recomputation ends in an exception once it has all
