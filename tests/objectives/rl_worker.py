"""Two steps of every RL objective on one rank or two. `test_rl_ranks.py` runs it.

    python rl_worker.py RANK WORLD FOLDER

Rank 0 writes all gradients and the state of SPO's tracker to FOLDER/WORLD.safetensors.
"""

import os
import sys
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from tests.objectives.conftest import Prompts, make_ready, make_small
from tinsmith.losses.policy import DAPOLoss, DrGRPOLoss
from tinsmith.objectives.grpo import GRPO
from tinsmith.objectives.ppo import PPO
from tinsmith.objectives.spo import SPO

SMALL = {"max_new_tokens": 6, "generation_batch_size": 3, "num_minibatches": 2, "temperature": 0.9}
CONFIGS = {
    "grpo": GRPO(num_generations=3, kl_coef=0.1, **SMALL),
    "dapo": GRPO(num_generations=3, loss=DAPOLoss(), mask_truncated=True, **SMALL),
    "dr_grpo": GRPO(num_generations=3, loss=DrGRPOLoss(), **SMALL),
    "ppo": PPO(kl_coef=0.1, **SMALL),
    "critic": PPO(critic="model", **SMALL),
    "spo": SPO(warmup_samples=2, **SMALL),
}


class Both:
    """Peers over gloo; both poll until no rank is busy."""

    def __init__(self, world: int):
        self.world = world

    def poll(self, busy: bool = False) -> bool:
        flag = torch.tensor(float(busy))
        dist.all_reduce(flag)
        return bool(flag)

    def gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        found: list = [None] * self.world
        dist.all_gather_object(found, tensors)
        return found


def summed(value: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(value)
    return value


def gradients(name: str, rank: int, world: int) -> dict[str, Tensor]:
    lm = make_small()
    objective = make_ready(CONFIGS[name], lm)
    if world > 1:
        objective.peers = Both(world)
    torch.manual_seed(1)
    noise = [torch.randn_like(p) for p in lm.parameters()]
    batches = objective.batches(Prompts(8 if name == "spo" else 4, rank, world), lm)
    found: dict[str, Tensor] = {}
    for step in range(2):
        for part, batch in enumerate(islice(batches, 2)):
            lm.zero_grad()
            objective.zero_grad()
            units = summed(objective.units(batch).double(), world)
            (objective.loss(lm, batch).total / units).backward()
            named = [*lm.named_parameters(), *objective.named_parameters()]
            for key, parameter in named:
                if parameter.grad is not None:
                    found[f"{name}.{step}.{part}.{key}"] = summed(parameter.grad.clone(), world)
        with torch.no_grad():
            for parameter, moved in zip(lm.parameters(), noise, strict=True):
                parameter += 0.02 * moved
    if name == "spo":
        found["tracker"] = torch.tensor([objective.tracker.state[n] for n in range(10)])
        found["kept"] = torch.tensor(
            [len(objective.response_cache.responses[n].ids) for n in range(10)]
        )
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1"}
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    found: dict[str, Tensor] = {}
    for name in CONFIGS:
        found |= gradients(name, rank, world)
    if rank == 0:
        save_file(found, folder / f"{world}.safetensors")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
