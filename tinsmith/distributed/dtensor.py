"""One interface to plain tensors and to DTensors, which FSDP2 spreads over ranks.

A DTensor lists a placement for each axis of its device mesh: `Shard(0)` means that every rank holds
some of its rows, `Replicate` that every rank holds all of it. On plain tensors these functions
return their argument.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return True if the tensor is spread over ranks."""
    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather the full tensor on every rank. On a DTensor this is a collective."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part that this rank holds. Writing to it writes to `tensor`."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a full tensor that every rank holds, with the placements of
    `like`. No communication.
    """
    if not is_dtensor(like):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def is_sharded_on_dim0(tensor: Tensor) -> bool:
    """Return True if a stack of experts (E, rows, columns) is spread by whole experts, so that
    each rank holds complete matrices.
    """
    return (
        is_dtensor(tensor)
        and tensor.dim() == 3
        and all(p.is_shard(0) or p.is_replicate() for p in tensor.placements)
    )


@torch.no_grad()
def write_rows(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
    """Overwrite rows of the first axis, outside of autograd. Every rank passes the same values."""
    if not is_dtensor(parameter):
        parameter[rows] = values.to(parameter)
        return
    full = parameter.full_tensor()
    full[rows] = values.to(full)
    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))


@torch.no_grad()
def accumulate_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add this rank's gradient of the full parameter to `.grad`.

    A plain parameter gets the gradient itself, because the trainer averages over ranks later. A
    DTensor gets the mean over ranks. A frozen parameter gets none.
    """
    if not parameter.requires_grad:
        return
    gradient = gradient.to(parameter.dtype)
    if is_dtensor(parameter):
        mesh = parameter.device_mesh
        summed = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim)
        gradient = summed.redistribute(placements=parameter.placements)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
