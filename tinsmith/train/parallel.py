"""Data parallelism: processes of torchrun, and the model copied to or sharded over them.

`ddp` keeps a whole copy on every rank and averages gradients; `fsdp` shards parameters,
gradients and optimizer state with FSDP2's `fully_shard`, block by block. There are no wrapper
objects: objectives see the same module either way.
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
    """This process and its process group. With one process no call communicates."""

    def __init__(self, rank: int, world_size: int, device: torch.device, kind: str):
        self.rank, self.world_size, self.device, self.kind = rank, world_size, device, kind

    @property
    def is_main(self) -> bool:
        """True on rank 0, the only one that logs and writes files."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Return True on every rank if `flag` is True on at least one."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item())

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        if self.world_size > 1:
            dist.barrier()

    def all_gather_bytes(self, data: bytes) -> list[bytes]:
        """Return the bytes of every rank, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [data]
        sizes = torch.zeros(self.world_size, dtype=torch.long, device=self.device)
        sizes[self.rank] = len(data)
        longest = int(self.all_reduce_sum(sizes).max())
        own = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        parts = [torch.zeros_like(own) for _ in range(self.world_size)]
        dist.all_gather(parts, own)
        return [
            bytes(p[:size].cpu().numpy()) for p, size in zip(parts, sizes.tolist(), strict=True)
        ]

    def destroy(self) -> None:
        """Destroy the process group, if there is one."""
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
    """Return the device called `name`; `auto` is CUDA, then MPS, then the CPU.

    Raise UserError if it cannot be used.
    """
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
    """Broadcast the weights of rank 0, and shard the policy with FSDP2 if `kind` is `fsdp`."""
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
    """Average gradients over ranks, in place. FSDP2 has averaged those of sharded parameters."""
    if ranks.world_size == 1:
        return
    for parameter in parameters:
        if not is_dtensor(parameter) and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks.world_size


def full_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Gather parameters (tied ones once) and buffers by name, unsharded and on the CPU. Every rank
    must call it.
    """
    named: dict[str, Any] = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: full_tensor(value).detach().cpu().contiguous() for name, value in named.items()}


@torch.no_grad()
def load_full_tensors(module: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copy unsharded tensors into parameters and buffers. Raise UserError if names or shapes
    differ.
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
