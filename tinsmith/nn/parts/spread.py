"""Parameters that may be spread over ranks (FSDP2), for what changes them outside of autograd and
the optimizer.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, distribute_tensor


def whole(parameter: nn.Parameter) -> Tensor:
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
def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
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
