"""Re-birth of experts that never fire.

Every `interval` optimizer steps, an expert that fired for no token of the global batches since the
last look (fallback and padding are not counted) begins anew: threshold 0, weights as at first, but
nothing where it writes, so that it changes no sum before it has learned. The first prototype
points where the tokens point that nobody fired for, the others away from all living ones. The
optimizer forgets the rows.

Counts are sums over micro-batches and ranks, and random rows come from a generator of their own:
all ranks do the same, and training's random numbers stay as they were. All counters are buffers,
so a resumed run looks at the same step with the same counts; they belong to the run and not to the
model, so a folder for others does not have them. Where any of these weights is frozen (adapters, a
skeleton), nothing is counted and nobody is born.

Legend: E experts, D width.
"""

import math

import torch
from torch import Tensor, nn

from tinsmith.core.rng import make_generator
from tinsmith.distributed.dtensor import full_tensor, write_rows
from tinsmith.nn.contract import OptimizerReset
from tinsmith.nn.layers.init import linear_init_std
from tinsmith.nn.moe.experts import ExpertOutWeight, ExpertWeight

ResetStds = dict[nn.Parameter, float]
"""Weights with the experts along their first axis -> the standard deviation of a newborn's; 0
where it writes.
"""


def prototype_norm(dim: int) -> float:
    """Of a prototype: its numbers are about 1."""
    return math.sqrt(dim)


def expert_reset_stds(experts: nn.Module) -> ResetStds:
    """Those of all stacks inside a module."""
    return {
        stack.weight: 0.0 if isinstance(stack, ExpertOutWeight) else linear_init_std(stack.weight)
        for stack in experts.modules()
        if isinstance(stack, ExpertWeight)
    }


class UsageWindow(nn.Module):
    """What was counted since the last look."""

    load: Tensor
    unrouted: Tensor
    tokens: Tensor
    steps: Tensor
    looks: Tensor
    newborn: Tensor

    def __init__(self, num_experts: int, dim: int, layer_idx: int, reset_interval: int | None):
        super().__init__()
        self.layer_idx, self.reset_interval = layer_idx, reset_interval
        counters = {
            "load": torch.zeros(num_experts, dtype=torch.long),
            "unrouted": torch.zeros(dim),
            **{name: torch.zeros((), dtype=torch.long) for name in ("tokens", "steps", "looks")},
            "newborn": torch.zeros(num_experts, dtype=torch.bool),
        }
        for name, zero in counters.items():
            self.register_buffer(name, zero, persistent=False)

    @torch.no_grad()
    def update(
        self,
        stats: dict[str, Tensor],
        prototypes: nn.Parameter,
        thresholds: nn.Parameter,
        reset_stds: ResetStds,
    ) -> list[OptimizerReset]:
        """Add the statistics of one step; at the end of a window, what was re-born."""
        trained = all(p.requires_grad for p in (prototypes, thresholds, *reset_stds))
        if self.reset_interval is None or not trained:
            return []
        self.load += stats["load"]
        self.unrouted += stats["unrouted"].to(self.unrouted.dtype)
        self.tokens += stats["tokens"]
        self.steps += 1
        if int(self.steps) < self.reset_interval:
            return []
        dead_E = (self.load == 0) & (self.tokens > 0)
        resets = (
            self._bear(dead_E, prototypes, thresholds, reset_stds) if bool(dead_E.any()) else []
        )
        self.newborn.copy_(dead_E)
        self.looks += 1
        for counter in (self.load, self.unrouted, self.tokens, self.steps):
            counter.zero_()
        return resets

    def _bear(
        self,
        dead_E: Tensor,
        prototypes: nn.Parameter,
        thresholds: nn.Parameter,
        reset_stds: ResetStds,
    ) -> list[OptimizerReset]:
        rows = dead_E.nonzero().flatten()
        draw = make_generator(0, "rebirth", self.layer_idx, int(self.looks))
        alive = full_tensor(prototypes).detach()[~dead_E].cpu().double()
        found = _directions(self.unrouted.cpu().double(), alive, len(rows), draw)
        write_rows(prototypes, rows, prototype_norm(prototypes.shape[1]) * found)
        write_rows(thresholds, rows, torch.zeros(len(rows)))
        for parameter, std in reset_stds.items():
            shape = (len(rows), *parameter.shape[1:])
            write_rows(parameter, rows, std * torch.randn(shape, generator=draw))
        return [
            OptimizerReset(parameter, rows) for parameter in (prototypes, thresholds, *reset_stds)
        ]


def _directions(unrouted_D: Tensor, alive: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """(count, D) unit vectors: along `unrouted` if it points anywhere, then random ones orthogonal
    to all before; where there is no room for another, just random.
    """
    found = alive
    for index in range(count):
        along = unrouted_D if index == 0 else torch.zeros_like(unrouted_D)
        if not bool(along.any()):
            along = torch.randn(len(unrouted_D), generator=draw, dtype=torch.float64)
            along = _away(along, found) if len(found) < len(along) else along
        found = torch.cat((found, (along / along.norm())[None]))
    return found[len(alive) :]


def _away(x_D: Tensor, others: Tensor) -> Tensor:
    """The part of x that is orthogonal to all rows of `others`."""
    basis = torch.linalg.qr(others.mT).Q
    return x_D - basis @ (basis.mT @ x_D)
