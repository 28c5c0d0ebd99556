"""A gate of thresholds: every token decides how many experts it wants (DynMoE, Guo et al.,
2405.14297).

    u_te = cos(x_t, p_e) - G_e        expert e works on token t where u_te > 0
    value_te = sg(1[u > 0] - sigmoid(kappa u)) + sigmoid(kappa u)

so the decision is hard and its gradient that of a sigmoid of slope 1 at the boundary (kappa = 4). A
token's experts are combined as `combine` says: k_t = number of them, never in the graph,

    mean   sum_e value_te y_te / k_t      sum   sum_e value_te y_te
    rescaled_sum   sum_e value_te y_te E / k_t

Prototypes are sqrt(D) long at first. No decision depends on it, but how fast they turn does: an
optimizer that moves every number by its rate, as Adam does, turns a long row slowly.

SDL, the sparse-diversity loss, is sdl_weight times ((k_mean - k*) / k*)^2 + mean over pairs of
experts of cos(p_i, p_j)^2; the first term's gradient also reaches experts that did not fire, so
k can rise. `sdl: dynmoe` is the paper's ||P P' - I||_F + mean ||p_e||, lengths in units of the
first ones. k_mean is that of a micro-batch: the one place where the split of a batch matters. Its
input is detached. As every loss of a part it is added up over layers, so what it does to a layer
does not depend on how many there are.

It differs from the paper's code in comparing cosines, not their sigmoids (the same decision), and
in giving a token that wants nobody its best expert in training too (`fallback`). u is rounded to
the grid of `parts.choose`, so that a zero is a zero however the sum was made.

Legend: N tokens, E experts, D width.

What parts share whose experts are chosen by a gate of thresholds.

Legend: B rows, T tokens, N = B T, E experts, P pairs, I inputs, O outputs.
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
"""Vectors shorter than this have no direction."""


@dataclass(frozen=True, kw_only=True)
class CosineRouterConfig(Config):
    """The keys of a gate of thresholds, for every part that owns one."""

    experts: Size
    combine: Literal["mean", "sum", "rescaled_sum"] = "mean"
    fallback: Literal["top1", "none_in_training", "none"] = "top1"
    target_active: float | None = None  # null: a quarter of the experts
    sdl: Literal["target", "dynmoe"] = "target"
    sdl_weight: float = 0.01
    reset_interval: Count | None = 1000  # optimizer steps between re-births; null: never

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
        """k*: how many experts a token is to have, in the mean."""
        return self.experts / 4 if self.target_active is None else self.target_active


class CosineRouterOutput(NamedTuple):
    """What a gate says of N tokens."""

    mask_NE: Tensor
    """bool: who works on whom, fallback included, padding not."""
    weight_NE: Tensor
    """What an expert's word counts, at least float32; of no meaning outside of the mask."""
    losses: dict[str, Tensor]
    """In training: "sdl"."""
    stats: dict[str, Tensor]
    """Sums over tokens: "load" (E,) experts that fired, before the fallback; "tokens" () that are
    no padding; "fallback" () of them that nobody fired for; "entropy" () of the weights, ln k_t;
    "unrouted" (D,) directions of the tokens nobody fired for; in training "sdl" () before its
    coefficient.
    """


class CosineRouter(Fp32Params):
    """Prototypes P (E, D), rows orthogonal where E <= D, and thresholds G (E,), cosines, 0."""

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
        """u (N, E)."""
        return margins(x_ND, self.prototypes, self.thresholds)

    def forward(
        self, x_ND: Tensor, valid_N: Tensor | None = None, differentiable: bool = True
    ) -> CosineRouterOutput:
        """`valid_N`: False for padding. `learns` False: the weights are constants, so no loss
        behind them reaches the gate or x through them.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            u_NE = self.margins(x_ND)
        valid_N = torch.ones_like(u_NE[:, 0], dtype=torch.bool) if valid_N is None else valid_N
        fired_NE = must_save(above_threshold(u_NE) & valid_N[:, None])
        mask_NE = must_save(self._with_fallback(u_NE, fired_NE, valid_N))
        count_N = mask_NE.sum(-1).to(u_NE.dtype)
        weight_NE = self._combined(_straight_through(u_NE, mask_NE), count_N[:, None])
        losses, stats = {}, _stats(x_ND, fired_NE, valid_N, count_N)
        if self.training and torch.is_grad_enabled():
            lost = self._sdl(x_ND.detach(), fired_NE, valid_N)
            losses["sdl"] = self.config.sdl_weight * lost
            stats["sdl"] = lost.detach() * stats["tokens"]
        return CosineRouterOutput(mask_NE, weight_NE, losses, stats)

    def post_step(self, stats: dict[str, Tensor], reset_stds: ResetStds) -> list[OptimizerReset]:
        """Count, and at the end of a window re-bear experts that never fired; see `rebirth`."""
        return self.window.update(stats, self.prototypes, self.thresholds, reset_stds)

    def flops(self) -> int:
        """Cosines of one token."""
        return 2 * self.prototypes.numel()

    def _with_fallback(self, u_NE: Tensor, fired_NE: Tensor, valid_N: Tensor) -> Tensor:
        kind = self.config.fallback
        if kind == "none" or (kind == "none_in_training" and self.training):
            return fired_NE
        silent_N = valid_N & ~fired_NE.any(-1)
        best_NE = torch.zeros_like(fired_NE).scatter(-1, stable_topk(u_NE, 1), True)
        return fired_NE | (best_NE & silent_N[:, None])

    def _combined(self, value_NE: Tensor, count_N1: Tensor) -> Tensor:
        if self.config.combine == "sum":
            return value_NE
        share_N1 = 1 / count_N1.clamp(min=1)
        if self.config.combine == "rescaled_sum":
            share_N1 = share_N1 * self.config.experts
        return value_NE * share_N1

    def _sdl(self, x_ND: Tensor, fired_NE: Tensor, valid_N: Tensor) -> Tensor:
        kind = at_least_fp32(x_ND.dtype)
        prototypes = self.prototypes.to(kind)
        with no_autocast(x_ND.device):
            unit = _unit(prototypes)
            similar_EE = unit @ unit.mT
        if self.config.sdl == "dynmoe":
            excess_EE = similar_EE - torch.eye(len(unit), dtype=kind, device=unit.device)
            lengths_E = prototypes.norm(dim=-1) / prototype_norm(prototypes.shape[1])
            return torch.linalg.vector_norm(excess_EE) + lengths_E.mean()
        value_NE = _straight_through(self.margins(x_ND), fired_NE) * valid_N[:, None]
        mean = value_NE.sum() / valid_N.sum().clamp(min=1)
        sparsity = (
            (mean - self.config.target_experts_per_token) / self.config.target_experts_per_token
        ).square()
        # 1 on the diagonal is a constant, yet rounding must not leave a gradient there
        other_EE = similar_EE.square().fill_diagonal_(0)
        pairs = max(len(unit) * (len(unit) - 1), 1)
        return sparsity + other_EE.sum() / pairs


def margins(x_ND: Tensor, prototypes_ED: Tensor, thresholds_E: Tensor) -> Tensor:
    """u (N, E): how far each cosine is above its threshold, at least float32."""
    kind = at_least_fp32(x_ND.dtype)
    with no_autocast(x_ND.device):
        cosine_NE = _unit(x_ND.to(kind)) @ _unit(prototypes_ED.to(kind)).mT
        return cosine_NE - thresholds_E.to(kind)


def above_threshold(u: Tensor) -> Tensor:
    """bool: u > 0, on the grid that makes ties come out the same."""
    return (u.detach() * GRID).round() > 0


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=MIN_NORM)


def _straight_through(u: Tensor, decision: Tensor) -> Tensor:
    """Forward the decision, to the bit; backward a sigmoid."""
    soft = torch.sigmoid(KAPPA * u)
    return decision.to(u.dtype) + (soft - soft.detach())


@torch.no_grad()
def _stats(x_ND: Tensor, fired_NE: Tensor, valid_N: Tensor, count_N: Tensor) -> dict[str, Tensor]:
    silent_N = valid_N & ~fired_NE.any(-1)
    kind = at_least_fp32(x_ND.dtype)
    with no_autocast(x_ND.device):
        unrouted_D = silent_N.to(kind) @ _unit(x_ND.to(kind))
    return {
        "load": fired_NE.sum(0),
        "tokens": valid_N.sum(),
        "fallback": silent_N.sum(),
        "entropy": count_N.clamp(min=1).log().sum(),
        "unrouted": unrouted_D,
    }


class CosineRouted(Routed):
    """A part whose experts are chosen by its `gate`."""

    gate: CosineRouter

    def route(self, x: Tensor, ctx: Ctx, differentiable: bool = True) -> CosineRouterOutput:
        """What the gate says of the tokens of x (B, T, D)."""
        valid_N = None if ctx.segments is None else ctx.segments.flatten() >= 0
        return self.gate(x.flatten(0, 1), valid_N, differentiable)

    def router_state(self) -> dict[str, Tensor]:
        """The gate's thresholds."""
        return {"thresholds": self.gate.thresholds}

    @torch.no_grad()
    def expert_mask(self, x: Tensor, ctx: Ctx) -> Tensor:
        """(B, T, E) bool: which experts work on which tokens."""
        return self.route(x, ctx).mask_NE.unflatten(0, x.shape[:2])


class ExpertMixture(NamedTuple):
    """The pairs of a choice, and what each counts."""

    plan: DispatchPlan
    weights_P: Tensor

    @classmethod
    def from_router_output(cls, router_output: CosineRouterOutput) -> "ExpertMixture":
        """From what a gate said."""
        plan = plan_from_mask(router_output.mask_NE)
        return cls(plan, plan.gather_weights(router_output.weight_NE))

    def __call__(self, x_BTI: Tensor, expert_fn: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(B, T, O): for each token the weighted sum over its experts. `work` (x_PI, ends_E) gives
        (P, O), what each pair's expert says.
        """
        x_NI = x_BTI.flatten(0, 1)
        y_PO = expert_fn(self.plan.gather(x_NI), self.plan.ends_E)
        return combine(y_PO, self.weights_P, self.plan, len(x_NI)).unflatten(0, x_BTI.shape[:2])
