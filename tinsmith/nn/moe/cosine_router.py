"""Router by cosine thresholds: each token selects every expert whose threshold it exceeds (DynMoE,
Guo et al., 2405.14297), so the number of experts per token varies.

    u_te = cos(x_t, p_e) - G_e        expert e is selected for token t where u_te > 0
    value_te = sg(1[u > 0] - sigmoid(kappa u)) + sigmoid(kappa u)

The forward value is the hard decision; the gradient is that of a sigmoid with slope 1 at u = 0
(kappa = 4). `combine` defines the weights, where k_t is the number of experts of token t and has no
gradient:

    mean   sum_e value_te y_te / k_t      sum   sum_e value_te y_te
    rescaled_sum   sum_e value_te y_te E / k_t

Prototypes p are initialised with length sqrt(D). The length does not affect u, but it affects how
fast a prototype turns: Adam changes every element by about the learning rate, so a long row turns
slowly.

The loss "sdl" (sparsity and diversity) is sdl_weight times

    ((k_mean - k*) / k*)^2 + mean over pairs of experts of cos(p_i, p_j)^2

The gradient of the first term also reaches experts that were not selected, so k can grow.
`sdl: dynmoe` is the paper's ||P P' - I||_F + mean ||p_e||, with lengths in units of the initial
ones. k_mean is the mean of a micro-batch, so this loss depends on how a batch is split. Its input
is detached. Like all auxiliary losses it is summed over layers.

Differences from the paper's code: it compares cosines instead of their sigmoids, which gives the
same decisions, and a token without any expert gets its best one in training too (`fallback`). u is
rounded to the grid of `layers.stable_topk`, so the decision at u = 0 does not depend on the order
of summation.

Legend: B rows, T tokens, N = B T, E experts, P pairs of token and expert, D width, I inputs, O
outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.core.parse import Config, Count, Size
from tinsmith.nn.contract import Ctx, OptimizerReset, Routed
from tinsmith.nn.layers.stable_topk import GRID, must_save, stable_topk
from tinsmith.nn.moe.dead_experts import ResetStds, UsageWindow, prototype_norm
from tinsmith.nn.moe.dispatch import DispatchPlan, combine, plan_from_mask
from tinsmith.nn.precision import Fp32Params, at_least_fp32, no_autocast

KAPPA = 4.0

MIN_NORM = 1e-6
"""Shorter vectors are divided by this instead of their length."""


@dataclass(frozen=True, kw_only=True)
class CosineRouterConfig(Config):
    """Recipe keys of a cosine router, for every module that has one."""

    experts: Size
    combine: Literal["mean", "sum", "rescaled_sum"] = "mean"
    fallback: Literal["top1", "none_in_training", "none"] = "top1"
    target_active: float | None = None  # null: a quarter of the experts
    sdl: Literal["target", "dynmoe"] = "target"
    sdl_weight: float = 0.01
    reset_interval: Count | None = (
        1000  # optimizer steps between resets of dead experts; null: never
    )

    def __post_init__(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts={self.experts} must be at least 1")
        if not 0 < self.target_experts_per_token <= self.experts:
            limits = f"above 0 and at most experts={self.experts}"
            raise ValueError(f"target_active={self.target_active} must be {limits}")
        if self.sdl_weight < 0:
            raise ValueError(f"sdl_weight={self.sdl_weight} must be at least 0")
        if self.reset_interval is not None and self.reset_interval < 1:
            raise ValueError(f"reset_interval={self.reset_interval} must be at least 1, or null")

    @property
    def target_experts_per_token(self) -> float:
        """k*: the target for the mean number of experts per token."""
        return self.experts / 4 if self.target_active is None else self.target_active


class CosineRouterOutput(NamedTuple):
    """The routing of N tokens."""

    mask_NE: Tensor
    """bool: the selected experts, with the fallback and without padding."""
    weight_NE: Tensor
    """Weight of each expert's output, at least float32. Undefined outside of the mask."""
    losses: dict[str, Tensor]
    """In training: "sdl"."""
    stats: dict[str, Tensor]
    """Sums over tokens: "load" (E,) selections of each expert, before the fallback; "tokens" ()
    without padding; "fallback" () tokens that selected no expert; "entropy" () of the weights,
    ln k_t; "unrouted" (D,) directions of the tokens that selected no expert; in training "sdl" ()
    before its coefficient.
    """


class CosineRouter(Fp32Params):
    """Prototypes P (E, D), initialised orthogonal if E <= D, and thresholds G (E,), initialised
    to 0.
    """

    ROLE: ClassVar = "router"
    FP32_PARAMS: ClassVar = ("prototypes", "thresholds")

    def __init__(self, config: CosineRouterConfig, dim: int, layer_idx: int):
        super().__init__()
        self.config = config
        prototypes = torch.empty(config.experts, dim)
        if config.experts <= dim:
            nn.init.orthogonal_(prototypes)
        else:
            prototypes = F.normalize(nn.init.normal_(prototypes), dim=-1)
        self.prototypes = nn.Parameter(prototype_norm(dim) * prototypes)
        self.thresholds = nn.Parameter(torch.zeros(config.experts))
        self.window = UsageWindow(config.experts, dim, layer_idx, config.reset_interval)

    def margins(self, x_ND: Tensor) -> Tensor:
        """Return u (N, E)."""
        return margins(x_ND, self.prototypes, self.thresholds)

    def forward(
        self, x_ND: Tensor, valid_N: Tensor | None = None, differentiable: bool = True
    ) -> CosineRouterOutput:
        """Route N tokens. `valid_N` is False for padding. Without `differentiable`, the weights are
        constants, and no gradient reaches the router or x through them.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            u_NE = self.margins(x_ND)
        valid_N = torch.ones_like(u_NE[:, 0], dtype=torch.bool) if valid_N is None else valid_N
        above_NE = must_save(above_threshold(u_NE) & valid_N[:, None])
        mask_NE = must_save(self._with_fallback(u_NE, above_NE, valid_N))
        count_N = mask_NE.sum(-1).to(u_NE.dtype)
        weight_NE = self._combine_weights(_straight_through(u_NE, mask_NE), count_N[:, None])
        losses, stats = {}, _stats(x_ND, above_NE, valid_N, count_N)
        if self.training and torch.is_grad_enabled():
            sdl = self._sdl(x_ND.detach(), above_NE, valid_N)
            losses["sdl"] = self.config.sdl_weight * sdl
            stats["sdl"] = sdl.detach() * stats["tokens"]
        return CosineRouterOutput(mask_NE, weight_NE, losses, stats)

    def post_step(self, stats: dict[str, Tensor], reset_stds: ResetStds) -> list[OptimizerReset]:
        """Count the selections of a step. At the end of a window, re-initialise experts that were
        never selected (`moe.dead_experts`).
        """
        return self.window.update(stats, self.prototypes, self.thresholds, reset_stds)

    def flops(self) -> int:
        """FLOPs of the cosines of one token."""
        return 2 * self.prototypes.numel()

    def _with_fallback(self, u_NE: Tensor, above_NE: Tensor, valid_N: Tensor) -> Tensor:
        fallback = self.config.fallback
        if fallback == "none" or (fallback == "none_in_training" and self.training):
            return above_NE
        unrouted_N = valid_N & ~above_NE.any(-1)
        best_NE = torch.zeros_like(above_NE).scatter(-1, stable_topk(u_NE, 1), True)
        return above_NE | (best_NE & unrouted_N[:, None])

    def _combine_weights(self, value_NE: Tensor, count_N1: Tensor) -> Tensor:
        if self.config.combine == "sum":
            return value_NE
        scale_N1 = 1 / count_N1.clamp(min=1)
        if self.config.combine == "rescaled_sum":
            scale_N1 = scale_N1 * self.config.experts
        return value_NE * scale_N1

    def _sdl(self, x_ND: Tensor, above_NE: Tensor, valid_N: Tensor) -> Tensor:
        dtype = at_least_fp32(x_ND.dtype)
        prototypes = self.prototypes.to(dtype)
        with no_autocast(x_ND.device):
            unit = _unit(prototypes)
            cosine_EE = unit @ unit.mT
        if self.config.sdl == "dynmoe":
            deviation_EE = cosine_EE - torch.eye(len(unit), dtype=dtype, device=unit.device)
            lengths_E = prototypes.norm(dim=-1) / prototype_norm(prototypes.shape[1])
            return torch.linalg.vector_norm(deviation_EE) + lengths_E.mean()
        value_NE = _straight_through(self.margins(x_ND), above_NE) * valid_N[:, None]
        mean = value_NE.sum() / valid_N.sum().clamp(min=1)
        sparsity = (
            (mean - self.config.target_experts_per_token) / self.config.target_experts_per_token
        ).square()
        # the diagonal is the constant 1; rounding must not give it a gradient
        off_diagonal_EE = cosine_EE.square().fill_diagonal_(0)
        num_pairs = max(len(unit) * (len(unit) - 1), 1)
        return sparsity + off_diagonal_EE.sum() / num_pairs


def margins(x_ND: Tensor, prototypes_ED: Tensor, thresholds_E: Tensor) -> Tensor:
    """Return u (N, E), the difference between each cosine and its threshold, in at least
    float32.
    """
    dtype = at_least_fp32(x_ND.dtype)
    with no_autocast(x_ND.device):
        cosine_NE = _unit(x_ND.to(dtype)) @ _unit(prototypes_ED.to(dtype)).mT
        return cosine_NE - thresholds_E.to(dtype)


def above_threshold(u: Tensor) -> Tensor:
    """Return u > 0 as bool, after rounding to the grid of `layers.stable_topk`."""
    return (u.detach() * GRID).round() > 0


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=MIN_NORM)


def _straight_through(u: Tensor, decision: Tensor) -> Tensor:
    """Return the decision exactly, with the gradient of a sigmoid."""
    soft = torch.sigmoid(KAPPA * u)
    return decision.to(u.dtype) + (soft - soft.detach())


@torch.no_grad()
def _stats(x_ND: Tensor, above_NE: Tensor, valid_N: Tensor, count_N: Tensor) -> dict[str, Tensor]:
    without_N = valid_N & ~above_NE.any(-1)
    dtype = at_least_fp32(x_ND.dtype)
    with no_autocast(x_ND.device):
        unrouted_D = without_N.to(dtype) @ _unit(x_ND.to(dtype))
    return {
        "load": above_NE.sum(0),
        "tokens": valid_N.sum(),
        "fallback": without_N.sum(),
        "entropy": count_N.clamp(min=1).log().sum(),
        "unrouted": unrouted_D,
    }


class CosineRouted(Routed):
    """A module whose experts are selected by a cosine router in `gate`."""

    gate: CosineRouter

    def route(self, x: Tensor, ctx: Ctx, differentiable: bool = True) -> CosineRouterOutput:
        """Route the tokens of x (B, T, D)."""
        valid_N = None if ctx.segments is None else ctx.segments.flatten() >= 0
        return self.gate(x.flatten(0, 1), valid_N, differentiable)

    def router_state(self) -> dict[str, Tensor]:
        """Return the thresholds."""
        return {"thresholds": self.gate.thresholds}

    @torch.no_grad()
    def expert_mask(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Return the selected experts of each token, (B, T, E) bool."""
        return self.route(x, ctx).mask_NE.unflatten(0, x.shape[:2])


class ExpertMixture(NamedTuple):
    """Pairs of token and expert, and the weight of each."""

    plan: DispatchPlan
    weights_P: Tensor

    @classmethod
    def from_router_output(cls, router_output: CosineRouterOutput) -> "ExpertMixture":
        """Make the pairs from a router's output."""
        plan = plan_from_mask(router_output.mask_NE)
        return cls(plan, plan.gather_weights(router_output.weight_NE))

    def __call__(self, x_BTI: Tensor, expert_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return the weighted sum over each token's experts, (B, T, O). `expert_fn` maps the pairs'
        inputs (P, I), sorted by expert, and the end of each expert's rows (E,) to outputs (P, O).
        """
        x_NI = x_BTI.flatten(0, 1)
        y_PO = expert_fn(self.plan.gather(x_NI), self.plan.ends_E)
        return combine(y_PO, self.weights_P, self.plan, len(x_NI)).unflatten(0, x_BTI.shape[:2])
