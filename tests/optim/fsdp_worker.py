"""Trains a small module on one rank, or spread over several by FSDP2; run by test_fsdp.py.

    python fsdp_worker.py RANK WORLD FOLDER

WORLD 1 is the plain module. Every rank sees the same data, so that the mean gradient is everyone's.
Rank 0 leaves weights and optimizer state in FOLDER/WORLD.safetensors, and every rank asserts that
saved state continues to the same bits.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tinsmith.distributed.dtensor import full_tensor
from tinsmith.optim.build import Optimizers
from tinsmith.optim.config import AdamWConfig, MuonConfig, OptimConfig

CONFIG = OptimConfig(
    matrices=MuonConfig(weight_decay=0.1), others=AdamWConfig(weight_decay=0.1, decay="all")
)


class Layer(nn.Module):
    """Parameters that two ranks cannot split evenly, and stacks with fewer slices than ranks."""

    EXPERT_STACKS = (
        "experts",
        "single",
    )

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 11)
        self.down = nn.Linear(11, dim)
        self.experts = nn.Parameter(torch.randn(3, dim, dim) / 5)
        self.single = nn.Parameter(torch.randn(1, dim, dim) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return x + torch.tanh(torch.einsum("eij,btj->bti", self.experts, x) @ self.single[0])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.blocks = nn.ModuleList([Layer(7), Layer(7)])
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build(world: int) -> Model:
    torch.manual_seed(0)
    model = Model().double()
    if world > 1:
        mesh = init_device_mesh("cpu", (world,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model: Model, optimizers: Optimizers, steps: range) -> None:
    for step in steps:
        source = torch.Generator().manual_seed(step)
        ids = torch.randint(13, (2, 6), generator=source)
        logits = model(ids[:, :-1]).flatten(0, 1)
        nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizers.set_lr_multiplier(1 / (1 + step))
        optimizers.step()
        optimizers.zero_grad()


def weights(model: Model) -> dict[str, Tensor]:
    return {n: full_tensor(p).detach().clone() for n, p in model.named_parameters()}


def main(rank: int, world: int, folder: Path) -> None:
    if world > 1:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    model = build(world)
    optimizers = Optimizers.build(model, None, CONFIG)
    train(model, optimizers, range(3))
    experts = model.blocks[0].experts
    optimizers.reset_state(
        [(experts, torch.tensor([0, 2])), (model.embed.weight, torch.tensor([5]))]
    )
    state = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    result = {f"state/{name}": tensor for name, tensor in state.items()}

    resumed = build(world)
    before = weights(model)
    with torch.no_grad():
        for (_, target), (_, made) in zip(
            resumed.named_parameters(), model.named_parameters(), strict=True
        ):
            target.copy_(made)
    continued = Optimizers.build(resumed, None, CONFIG)
    continued.load_state_tensors(state)
    train(model, optimizers, range(3, 5))
    train(resumed, continued, range(3, 5))
    after = weights(model)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, after[name]), name
        assert not torch.equal(tensor, before[name]), name
    if rank == 0:
        save_file(result | after, folder / f"{world}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    # FSDP2 over gloo now and then aborts while the interpreter goes down, with nothing left to do
    # and without our optimizers too. A failure above never gets here.
    os._exit(0)
