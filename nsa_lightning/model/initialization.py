"""First values of the weights: the same numbers on one rank and, sharded, on any number of them."""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def fill_normal(parameter: Tensor, mean: float, std: float, seed: int, name: str) -> None:
    """Fill a parameter with normal numbers that depend on `seed`, its name and the kind of device alone.

    Every rank draws the whole parameter and keeps its shard: no communication, and no more than one whole parameter
    in memory at a time.
    """
    if std == 0:
        parameter.fill_(mean)
        return
    device = torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest) >> 1)
    copy_whole(parameter, torch.zeros(parameter.shape, device=device).normal_(mean, std, generator=generator))


@torch.no_grad()
def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's part of it into its shard; every rank has the whole one."""
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        shard = distribute_tensor(whole.to(mesh.device_type), mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(whole)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model on the meta device memory, not yet written, and share again what was shared."""
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared.setdefault(id(parameter), []).append((module, name))
    model.to_empty(device=device)
    for (owner, owner_name), *others in shared.values():
        for module, name in others:
            setattr(module, name, getattr(owner, owner_name))
