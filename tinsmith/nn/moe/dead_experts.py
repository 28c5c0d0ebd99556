"""Re-initialise dead experts, which no token selects.

Every `reset_interval` optimizer steps, an expert that no token of the global batches has selected
since the last reset (fallback and padding do not count) is re-initialised: threshold 0, weights
from their initial distribution, but output weights 0, so that it does not change the output before
it is trained. The first new prototype points in the mean direction of the tokens that selected no
expert, the others are orthogonal to all live ones. The optimizer state of these rows is reset.

Counts are sums over micro-batches and ranks, and random rows come from a separate generator: all
ranks do the same, and the random numbers of training do not change. All counters are buffers, so a
resumed run resets at the same step with the same counts; they belong to the run, not to the model,
so exported folders do not have them. If any of these weights is frozen (adapters, a frozen
skeleton), nothing is counted and no expert is reset.

Legend: E experts, D width.
"""

import math

import torch
from torch import Tensor, nn

from tinsmith.core.rng import make_generator
from tinsmith.distributed.dtensor import full_tensor, write_rows
from tinsmith.nn.contract import OptimizerReset
from tinsmith.nn.layers.linear import ExpertOutWeight, ExpertWeight, linear_init_std

ResetStds = dict[nn.Parameter, float]
"""Weights whose first axis is experts -> the standard deviation of a re-initialised expert; 0 for
output weights.
"""


def prototype_norm(dim: int) -> float:
    """Return the initial length of a prototype; its elements are about 1."""
    return math.sqrt(dim)


def expert_reset_stds(experts: nn.Module) -> ResetStds:
    """Return the standard deviations for all stacks of experts inside a module."""
    return {
        stack.weight: 0.0 if isinstance(stack, ExpertOutWeight) else linear_init_std(stack.weight)
        for stack in experts.modules()
        if isinstance(stack, ExpertWeight)
    }


class UsageWindow(nn.Module):
    """Counters of expert usage since the last reset."""

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
        """Add the statistics of one step; at the end of a window, reset dead experts and return
        their rows.
        """
        trainable = all(p.requires_grad for p in (prototypes, thresholds, *reset_stds))
        if self.reset_interval is None or not trainable:
            return []
        self.load += stats["load"]
        self.unrouted += stats["unrouted"].to(self.unrouted.dtype)
        self.tokens += stats["tokens"]
        self.steps += 1
        if int(self.steps) < self.reset_interval:
            return []
        dead_E = (self.load == 0) & (self.tokens > 0)
        resets = (
            self._reset(dead_E, prototypes, thresholds, reset_stds) if bool(dead_E.any()) else []
        )
        self.newborn.copy_(dead_E)
        self.looks += 1
        for counter in (self.load, self.unrouted, self.tokens, self.steps):
            counter.zero_()
        return resets

    def _reset(
        self,
        dead_E: Tensor,
        prototypes: nn.Parameter,
        thresholds: nn.Parameter,
        reset_stds: ResetStds,
    ) -> list[OptimizerReset]:
        rows = dead_E.nonzero().flatten()
        generator = make_generator(0, "rebirth", self.layer_idx, int(self.looks))
        live = full_tensor(prototypes).detach()[~dead_E].cpu().double()
        directions = _new_directions(self.unrouted.cpu().double(), live, len(rows), generator)
        write_rows(prototypes, rows, prototype_norm(prototypes.shape[1]) * directions)
        write_rows(thresholds, rows, torch.zeros(len(rows)))
        for parameter, std in reset_stds.items():
            shape = (len(rows), *parameter.shape[1:])
            write_rows(parameter, rows, std * torch.randn(shape, generator=generator))
        return [
            OptimizerReset(parameter, rows) for parameter in (prototypes, thresholds, *reset_stds)
        ]


def _new_directions(
    unrouted_D: Tensor, live: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Return unit vectors (count, D) for new prototypes.

    The first is along `unrouted_D` if that is not 0. The others are random and orthogonal to all
    earlier vectors and to the live prototypes, or just random if there is no orthogonal direction
    left.
    """
    vectors = live
    for index in range(count):
        vector = unrouted_D if index == 0 else torch.zeros_like(unrouted_D)
        if not bool(vector.any()):
            vector = torch.randn(len(unrouted_D), generator=generator, dtype=torch.float64)
            vector = _orthogonal_part(vector, vectors) if len(vectors) < len(vector) else vector
        vectors = torch.cat((vectors, (vector / vector.norm())[None]))
    return vectors[len(live) :]


def _orthogonal_part(x_D: Tensor, others: Tensor) -> Tensor:
    """Return the part of x that is orthogonal to all rows of `others`."""
    basis = torch.linalg.qr(others.mT).Q
    return x_D - basis @ (basis.mT @ x_D)
