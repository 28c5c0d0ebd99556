"""Tensors that may be spread over ranks (DTensors, as FSDP2 makes them), seen as plain ones.

`whole` gathers, `part` takes this rank's share again; on plain tensors both do nothing.
"""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, distributed

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_spread(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether this rank holds only a part."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, on every rank; a collective where it is spread."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds; writing to it writes to `tensor`."""
    return tensor.to_local() if is_spread(tensor) else tensor


def part(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a full tensor that every rank has, spread as `like` is; no messages."""
    if not is_spread(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None).to_local()


def holds_slices(tensor: Tensor) -> bool:
    """Whether a stack (E, rows, columns) is spread by whole slices, so that none is in parts."""
    return (
        is_spread(tensor)
        and tensor.dim() == 3
        and all(p.is_shard(0) or p.is_replicate() for p in tensor.placements)
    )
