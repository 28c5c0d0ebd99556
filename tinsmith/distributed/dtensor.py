"""Tensors that may be spread over ranks (DTensors, as FSDP2 makes them), seen as plain ones.

`whole` gathers, `part` takes this rank's share again; on plain tensors both do nothing.

Parameters that may be spread over ranks (FSDP2), for what changes them outside of autograd and
the optimizer.
"""

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this rank holds only a part."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; a collective where it is spread."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """The part that this rank holds; writing to it writes to `tensor`."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor that every rank has, spread as `like` is; no messages."""
    if not is_dtensor(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def is_sharded_on_dim0(tensor: Tensor) -> bool:
    """Whether a stack (E, rows, columns) is spread by whole slices, so that none is in parts."""
    return (
        is_dtensor(tensor)
        and tensor.dim() == 3
        and all(p.is_shard(0) or p.is_replicate() for p in tensor.placements)
    )


def gather_detached(parameter: nn.Parameter) -> Tensor:
    """All of it, detached; every rank must call it."""
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.detach()


@torch.no_grad()
def write_rows(parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
    """Overwrite rows of the first axis; every rank gives the same."""
    if not isinstance(parameter, DTensor):
        parameter[rows] = values.to(parameter)
        return
    full = parameter.full_tensor()
    full[rows] = values.to(full)
    parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))


@torch.no_grad()
def accumulate_grad(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add this rank's gradient of the whole parameter to `.grad`: as it is where every rank holds
    all of it (the trainer averages), the mean over ranks where it is spread; none to a frozen one.
    """
    if not parameter.requires_grad:
        return
    gradient = gradient.to(parameter.dtype)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        summed = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim)
        gradient = summed.redistribute(placements=parameter.placements)
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
