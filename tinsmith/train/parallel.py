"""One process among several, and the same module spread over them.

`ddp` keeps a whole copy on every rank and averages gradients; `fsdp` shards parameters,
gradients and optimizer state with FSDP2's `fully_shard`, block by block. No wrapper objects:
objectives see the same module either way. Nothing outside of `train` knows about ranks.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import distribute_tensor

from tinsmith.core.errors import UserError
from tinsmith.distributed.dtensor import full_tensor, is_dtensor
from tinsmith.nn.model import LM


@dataclass(frozen=True)
class Mesh:
    """Number of processes of a run, and how the model is distributed over them."""

    kind: str
    """`none` (one process), `ddp` or `fsdp`."""
    world_size: int

    @staticmethod
    def from_environment(kind: str) -> "Mesh":
        """Read the world size that torchrun set. Raise UserError if there are several processes and
        `kind` is `none`.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size > 1 and kind == "none":
            raise UserError(
                "parallel.kind: none, but torchrun started several processes; use ddp or fsdp"
            )
        return Mesh(kind if world_size > 1 else "none", world_size)


class Ranks:
    """This process and its peers; with one process every call is free."""

    def __init__(self, rank: int, world_size: int, device: torch.device, kind: str):
        self.rank, self.world_size, self.device, self.kind = rank, world_size, device, kind

    @property
    def is_main(self) -> bool:
        """Rank 0 speaks and writes."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier()

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, on every rank."""
        if self.world_size == 1:
            return [data]
        sizes = torch.zeros(self.world_size, dtype=torch.long, device=self.device)
        sizes[self.rank] = len(data)
        longest = int(self.all_reduce_sum(sizes).max())
        mine = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        parts = [torch.zeros_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return [
            bytes(p[:size].cpu().numpy()) for p, size in zip(parts, sizes.tolist(), strict=True)
        ]

    def destroy(self) -> None:
        """End the process group, if there is one."""
        if self.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def init_distributed(mesh: Mesh, device: torch.device) -> Ranks:
    """Join the process group of torchrun, if there is one. On GPUs every process takes its own."""
    rank = int(os.environ.get("RANK", "0"))
    if mesh.world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(rank, mesh.world_size, device, mesh.kind)


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"train.device: '{name}' cannot be used here ({reason}); try auto or cpu"
        ) from None
    return device


def parallelize(policy: LM, objective: nn.Module, ranks: Ranks) -> None:
    """Make all ranks start from rank 0's weights, and shard them where asked."""
    if ranks.world_size == 1:
        return
    for tensor in (
        *policy.parameters(),
        *policy.buffers(),
        *objective.parameters(),
        *objective.buffers(),
    ):
        dist.broadcast(tensor.detach(), 0)
    if ranks.kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for block in policy.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(policy, mesh=mesh)


def average_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Mean over ranks of the gradients of parameters that are whole on every rank (sharded ones
    already are).
    """
    if ranks.world_size == 1:
        return
    for parameter in parameters:
        if not is_dtensor(parameter) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks.world_size


def full_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and buffers by name, whole and on the CPU; every rank must
    call it.
    """
    named: dict[str, Any] = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: full_tensor(value).detach().cpu().contiguous() for name, value in named.items()}


@torch.no_grad()
def load_full_tensors(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy whole tensors into the module's parameters and buffers; UserError where names or
    shapes differ.
    """
    named: dict[str, Any] = dict(module.named_parameters()) | dict(module.named_buffers())
    for name in sorted(named.keys() ^ tensors.keys()):
        what = "is missing" if name in named else "is not part of this model"
        raise UserError(
            f"{where}: tensor '{name}' {what}; the checkpoint is of another architecture"
        )
    for name, target in named.items():
        saved = tensors[name]
        if tuple(saved.shape) != tuple(target.shape):
            shapes = f"{tuple(saved.shape)}, the model wants {tuple(target.shape)}"
            raise UserError(
                f"{where}: tensor '{name}' has shape {shapes}; the checkpoint is of another "
                "architecture"
            )
        if is_dtensor(target):
            saved = distribute_tensor(
                saved.to(target.device), target.device_mesh, target.placements
            )
        target.copy_(saved)
