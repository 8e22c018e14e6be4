"""`--trainer.strategy fsdp2`: parameters, gradients and optimizer state sharded over all ranks."""

import math
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from nsa_kernels.errors import SettingError
from nsa_kernels.settings import check_arguments
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nsa_lightning.checkpoint.atomic import beside, publish, remove, save_file
from nsa_lightning.checkpoint.sharded import META, read_shards, saving, split
from nsa_lightning.checkpoint.summary import check_same_sizes, read_summary
from nsa_lightning.data.datamodule import PackedTextDataModule
from nsa_lightning.model.context_parallel import ContextParallel
from nsa_lightning.model.initialization import copy_whole
from nsa_lightning.model.transformer import Transformer
from nsa_lightning.training.compat import MeshStrategy
from nsa_lightning.training.sharding import shard_transformer


class ShardedMixedPrecision(MixedPrecision):
    """bf16-mixed without autocast: sharded modules gather their weights in bf16 and compute in it."""

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Nothing to switch on."""
        yield


class FSDP2Strategy(MeshStrategy):
    """Shard parameters, gradients and optimizer state over all ranks, block by block.

    Weights and optimizer state are float32, gradients are reduced in float32. `trainer.precision` is `32-true`, or
    `bf16-mixed` to gather weights and compute in bf16.

    Args:
        context_parallel_size: ranks that share each batch: everywhere but in attention each computes a part of its
            tokens, and in attention a part of the heads for all of them. Divides num_kv_heads.
        cpu_offload: keep shards and optimizer state in host memory and run the optimizer there.
        reshard_after_forward: free a block's weights between its forward and its backward; false trades memory for
            one gathering less.
        reduce_every_batch: with trainer.accumulate_grad_batches, reduce gradients after every batch instead of the
            last; false holds whole float32 gradients on every rank meanwhile.
        save_distributed_checkpoint: every rank writes its own shard into a directory; false gathers one file on
            rank 0.
        async_checkpoint: train on while a directory is written, from a copy of the shards in host memory.

    Raises:
        ValueError: trainer.precision is another, one file is to be written in the background, or the ranks, the
            heads or the tokens of a batch cannot be shared by context_parallel_size.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        context_parallel_size: int = 1,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        reduce_every_batch: bool = False,
        save_distributed_checkpoint: bool = True,
        async_checkpoint: bool = False,
    ) -> None:
        check_arguments(FSDP2Strategy.__init__, locals())
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint)
        if async_checkpoint and not save_distributed_checkpoint:
            raise SettingError("async_checkpoint must be false with save_distributed_checkpoint=false, got true")
        if context_parallel_size < 1:
            raise SettingError(f"context_parallel_size must be at least 1, got {context_parallel_size}")
        self.context_parallel_size = context_parallel_size
        self.save_distributed_checkpoint = save_distributed_checkpoint
        self.async_checkpoint = async_checkpoint
        self._background = ThreadPoolExecutor(1)
        self._unfinished: list[Future[Any]] = []
        self._saving_group: distributed.ProcessGroup | None = None
        self.cpu_offload = cpu_offload
        self.reshard_after_forward = reshard_after_forward
        self.reduce_every_batch = reduce_every_batch

    @property
    def precision_plugin(self) -> Precision:
        """What trainer.precision stands for."""
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        precision = plugin.precision if plugin is not None else "32-true"
        if precision not in ("32-true", "bf16-mixed"):
            raise SettingError(
                f"trainer.precision must be 32-true or bf16-mixed with trainer.strategy=fsdp2, got {precision}; "
                "bf16-mixed computes in bf16 and keeps float32 weights"
            )
        if isinstance(plugin, MixedPrecision):
            plugin = ShardedMixedPrecision("bf16-mixed", plugin.device)
        ModelParallelStrategy.precision_plugin.fset(self, plugin)  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """Start the processes, whose number must fit the model and the data."""
        self._check_context_parallel(self.num_nodes * self.num_processes)
        super().setup_environment()
        if self.async_checkpoint and self._saving_group is None:
            self._saving_group = distributed.new_group(backend="gloo")

    def make_mesh(self) -> DeviceMesh:
        """Lay out the ranks, neighbours next to each other in the dimension that shares a batch."""
        shape = (self.world_size // self.context_parallel_size, self.context_parallel_size)
        names = ("data_parallel", "context_parallel")
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)

    def _check_context_parallel(self, ranks: int) -> None:
        """Refuse what cannot be shared evenly, before any data is read."""
        module: Any = self.lightning_module
        data = getattr(module.trainer, "datamodule", None)
        shape = (data.seq_len, data.batch_size) if isinstance(data, PackedTextDataModule) else None
        check_context_parallel(self.context_parallel_size, ranks, module.transformer_config.num_kv_heads, shape)

    def teardown(self) -> None:
        """Wait for the last checkpoint."""
        self._finish_saving()
        super().teardown()

    def choose_backend(self) -> str:
        """NCCL for the GPU; gloo beside it, for offloaded shards."""
        return "cpu:gloo,cuda:nccl" if self.root_device.type == "cuda" else "gloo"

    def shard(self, model: Transformer) -> None:
        """Shard the decoder over all ranks, in place, and tell it which of them share a batch."""
        context, ranks = self.device_mesh["context_parallel"], (self.world_size,)
        if context.size() > 1:
            model.parallel = ContextParallel(context.get_group(), context.get_local_rank(), context.size())
        compute = torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None
        shard_transformer(
            model,
            init_device_mesh(self.root_device.type, ranks),
            MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False),
            CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda") if self.cpu_offload else OffloadPolicy(),
            self.reshard_after_forward,
        )

    @property
    def parameter_device(self) -> torch.device:
        """Where shards are kept."""
        return torch.device("cpu") if self.cpu_offload else self.root_device

    def model_to_device(self) -> None:
        """Move what is not sharded: shards are made where they are kept."""
        assert self.lightning_module is not None
        for child in self.lightning_module.children():
            if not isinstance(child, FSDPModule):
                child.to(self.root_device)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Leave out the reduction of gradients, between two steps of the optimizer."""
        shards = [module for module in self.model.modules() if isinstance(module, FSDPModule)] if self.model else []
        for module in shards:
            module.set_requires_gradient_sync(self.reduce_every_batch, recurse=False)
        yield
        for module in shards:
            module.set_requires_gradient_sync(True, recurse=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands the optimizer what `load_checkpoint` returns, as with any other strategy."""
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Nothing is left to do: `load_checkpoint` writes into the parameters."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over the optimizers' state.

        Raises:
            ValueError: the checkpoint holds weights alone.
        """
        states = checkpoint.get("optimizer_states", [])
        if len(states) != len(self.optimizers):
            raise SettingError(
                f"ckpt_path must hold the state of {len(self.optimizers)} optimizer to train on, got {len(states)}; "
                "was it saved with checkpoint.save_weights_only?"
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Parameters: shards, or whole on rank 0 for a checkpoint of one file."""
        return {name: self._as_saved(value) for name, value in self._parameters.items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """State as torch numbers it: shards, or whole on rank 0 for a checkpoint of one file."""
        state = optimizer.state_dict()
        values = {
            number: {key: self._as_saved(value) for key, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return state | {"state": values}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a directory with a file a rank, or one file; the previous one stays until the new one is complete."""
        name = str(filepath)
        path, temporary = (Path(each) for each in self.broadcast((name, str(beside(Path(name), "tmp")))))
        if not self.save_distributed_checkpoint:
            super(ModelParallelStrategy, self).save_checkpoint(checkpoint, path, storage_options)
            return
        self._finish_saving()
        if self.is_global_zero:
            remove(temporary)
        self.barrier()
        tensors, rest = split(checkpoint, [[name for name, _ in self._ordered(o)] for o in self.optimizers])
        written: Future[Any] | None = None
        if self.async_checkpoint:
            group = self._saving_group
            written = cast("Future[Any]", dcp.async_save(tensors, checkpoint_id=temporary, process_group=group))
            self._unfinished.append(written)
        else:
            with saving(path, temporary, removes=self.is_global_zero):
                dcp.save(tensors, checkpoint_id=temporary)
        if self.is_global_zero:
            self._unfinished.append(self._background.submit(_complete, written, deepcopy(rest), temporary, path))
        if not self.async_checkpoint:
            self._finish_saving()
            self.barrier()

    def remove_checkpoint(self, filepath: Any) -> None:
        """Remove a checkpoint, once the one that takes its place is complete."""
        if self.is_global_zero:
            self._unfinished.append(self._background.submit(remove, Path(filepath)))

    def _finish_saving(self) -> None:
        """Wait for what this rank has yet to write; without the others, which may have ended."""
        unfinished, self._unfinished = self._unfinished, []
        for part in unfinished:
            part.result()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a directory or a file, written by any number of ranks; the parameters are overwritten.

        Raises:
            ValueError: it is incomplete, or its parameters have other sizes.
        """
        path = Path(self.broadcast(str(checkpoint_path)))
        parameters = self._parameters
        check_same_sizes(read_summary(path)["state_dict"], parameters)
        if path.is_dir():
            return read_shards(path, parameters, self.optimizers)
        checkpoint: dict[str, Any] = torch.load(path, mmap=True, weights_only=True, map_location="cpu")
        for name, parameter in parameters.items():
            copy_whole(parameter, checkpoint["state_dict"][name])
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", []), strict=False):
            for number, (_, parameter) in enumerate(self._ordered(optimizer)):
                entry = state["state"].get(number, {})
                for key, value in entry.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entry[key] = torch.zeros_like(parameter)
                        copy_whole(entry[key], value)
        return checkpoint | {"state_dict": parameters}

    @property
    def _parameters(self) -> dict[str, Any]:
        """This rank's shards by name."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def _ordered(self, optimizer: Optimizer) -> list[tuple[str, Tensor]]:
        """Parameters and their names in the order in which the optimizer numbers them."""
        assert self.lightning_module is not None
        for module in self.lightning_module.children():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward without backward the root still shows its gathered weights
        names = {parameter: name for name, parameter in self.lightning_module.named_parameters()}
        return [(names[p], p) for group in optimizer.param_groups for p in group["params"]]

    def _as_saved(self, value: Any) -> Any:
        if self.save_distributed_checkpoint or not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.is_global_zero else value


def _complete(written: Future[Any] | None, rest: dict[str, Any], temporary: Path, path: Path) -> None:
    """Add to the shards of all ranks what is not sharded, and put the checkpoint in its place."""
    with saving(path, temporary, removes=True):
        if written is not None:
            written.result()  # rank 0 has the table of contents when the others have their shards
        save_file(rest, temporary / META)
    publish(temporary, path)


def check_context_parallel(size: int, ranks: int, num_kv_heads: int, shape: tuple[int, int] | None) -> None:
    """Refuse ranks, heads and tokens that cannot be shared evenly.

    Args:
        size: ranks that share each batch.
        ranks: all of them.
        num_kv_heads: of every attention layer.
        shape: tokens in a sequence and sequences in a batch, where they are known.

    Raises:
        ValueError: `size` does not divide one of them.
    """
    if ranks % size or num_kv_heads % size:
        raise SettingError(
            "context_parallel_size must divide the number of ranks and num_kv_heads, "
            f"got {size}, {ranks} and {num_kv_heads}; at most {math.gcd(ranks, num_kv_heads)} does"
        )
    if shape is not None and math.prod(shape) % size:
        raise SettingError(
            "data.seq_len times data.batch_size must be a multiple of context_parallel_size, "
            f"got {shape[0]}, {shape[1]} and {size}"
        )


def ranks_a_batch(trainer: Trainer) -> int:
    """How many ranks share each batch."""
    return trainer.strategy.context_parallel_size if isinstance(trainer.strategy, FSDP2Strategy) else 1


StrategyRegistry.register(
    FSDP2Strategy.strategy_name, FSDP2Strategy, description="parameters, gradients and optimizer state sharded (FSDP2)"
)
