"""Which parameters are sharded together (FSDP2): every decoder block by itself, the rest with the root."""

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from nsa_lightning.model.transformer import Transformer


def shard_dimension(parameter: Tensor, ranks: int) -> int:
    """The first; the second of a block summary's matrices [H_kv, in, out], where there are more ranks than KV heads."""
    uneven = parameter.ndim == 3 and parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0
    return 1 if uneven else 0


def shard_transformer(
    model: Transformer,
    mesh: DeviceMesh,
    precision: MixedPrecisionPolicy,
    offload: OffloadPolicy,
    reshard_after_forward: bool = True,
) -> None:
    """Shard a decoder over a mesh dimension, in place.

    A block's weights are gathered for its forward and again for its backward. Embedding, final norm and output layer
    form the root unit, which stays gathered from the forward to the backward: tied weights must be in one unit, and
    the loss reads the output layer outside any forward.

    Args:
        model: on the meta device, or with its weights.
        mesh: one dimension, over which gradients are averaged.
        precision: dtypes of computation and of gradient reduction.
        offload: where shards are kept.
        reshard_after_forward: free a block's weights between its forward and its backward.
    """
    ranks = mesh.size()

    def placement(parameter: nn.Parameter) -> Shard:
        return Shard(shard_dimension(parameter, ranks))

    for block in model.layers:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
        )
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload, shard_placement_fn=placement)
