"""Mixture of experts with a variable number of experts per token (DynMoE, Guo et al., 2405.14297;
Tiny-ONN): a token selects every expert whose threshold it exceeds.

    y_t = sum over the experts e of token t of c_te f_e(x_t)

`moe.cosine_router` selects the experts and has the loss "sdl". `moe.dead_experts` re-initialises
unused experts every `reset_interval` steps. With `router_grad: smk` or `sml` the router is trained
by `moe.surprise_router` instead of the task loss. An expert whose down projection is 0 and a token
without experts contribute 0, never NaN.

Legend: B rows, T tokens, N = B T, D width, P pairs of a token and an expert.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import (
    BuildContext,
    Ctx,
    FeedForward,
    FeedForwardConfigBase,
    OptimizerReset,
    Out,
)
from tinsmith.nn.moe.cosine_router import (
    CosineRouted,
    CosineRouter,
    CosineRouterConfig,
    CosineRouterOutput,
)
from tinsmith.nn.moe.dead_experts import expert_reset_stds
from tinsmith.nn.moe.dispatch import combine, plan_from_mask
from tinsmith.nn.moe.experts import Activation, Experts
from tinsmith.nn.moe.surprise import AttachProbes, attach_probes
from tinsmith.nn.moe.surprise_router import SurpriseRouterConfig, add_router_gradients


@dataclass(frozen=True, kw_only=True)
class DynMoE(CosineRouterConfig, SurpriseRouterConfig, FeedForwardConfigBase):
    """Experts of width `hidden_dim`; each token selects those whose thresholds it exceeds."""

    kind: Literal["dyn_moe"] = "dyn_moe"
    hidden_dim: Size
    activation: Activation = "swiglu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_surprise_router()
        if self.uses_surprise and self.experts < 2:
            raise ValueError(
                f"router_grad={self.router_grad} compares experts, so experts=1 is too few"
            )
        if self.hidden_dim < 1:
            raise ValueError(f"hidden_dim={self.hidden_dim} must be at least 1")

    def build(self, build_ctx: BuildContext) -> "DynMoEFeedForward":
        """Build the module."""
        return DynMoEFeedForward(self, build_ctx)


class DynMoEFeedForward(FeedForward, CosineRouted):
    """The module of `DynMoE`."""

    def __init__(self, config: DynMoE, build_ctx: BuildContext):
        super().__init__()
        self.config = config
        self.gate = CosineRouter(config, build_ctx.dim, build_ctx.layer_idx)
        self.experts = Experts(build_ctx.dim, config.experts, config.hidden_dim, config.activation)
        # torch.compile cannot create tensors that require a gradient; `disable` loads the compiler
        self._attach = cast(
            AttachProbes,
            torch.compiler.disable(attach_probes) if config.uses_surprise else attach_probes,
        )

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D); stats and losses are those of the router."""
        x_ND = x.flatten(0, 1)
        routing = self.route(x, ctx, differentiable=self.config.uses_task_gradient)
        if self.training and torch.is_grad_enabled() and self.config.uses_surprise:
            return self._forward_with_probes(x, routing)
        plan = plan_from_mask(routing.mask_NE)
        weights_P = plan.gather_weights(routing.weight_NE)
        y_ND = combine(self.experts(x_ND, plan), weights_P, plan, len(x_ND))
        return Out(y_ND.view_as(x), routing.losses, routing.stats)

    def _forward_with_probes(self, x: Tensor, routing: CosineRouterOutput) -> Out:
        y_ND, probes = self._attach(
            self.experts,
            x.flatten(0, 1),
            routing.mask_NE,
            routing.weight_NE,
            self.config.needs_output_grad,
        )
        losses = routing.losses | {"sdl": routing.losses["sdl"] + probes["loss_scale"]}
        return Out(y_ND.view_as(x), losses, routing.stats, probes)

    def after_backward(self, grad_probes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the router's gradients from surprise, if `router_grad` uses it."""
        return (
            add_router_gradients(self.config, self.gate, self.experts, grad_probes)
            if grad_probes
            else {}
        )

    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Re-initialise dead experts at the end of a window."""
        return self.gate.post_step(stats, expert_reset_stds(self.experts))

    def flops(self) -> int:
        """Count the router and the target number of experts per token; the actual number varies."""
        return self.gate.flops() + round(
            self.config.target_experts_per_token * self.experts.flops()
        )

    def inactive_parameters(self) -> int:
        """Count the parameters of unused experts, at the target number of experts per token."""
        total = sum(parameter.numel() for parameter in self.experts.parameters())
        return round(total * (1 - self.config.target_experts_per_token / self.config.experts))
