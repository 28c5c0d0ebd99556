"""Experts that tokens choose freely (DynMoE, Guo et al., 2405.14297; Tiny-ONN): as many for each
token as lie above their thresholds.

    y_t = sum over the experts e of token t of c_te f_e(x_t)

The gate is `routing.threshold`, with its loss SDL; `routing.rebirth` begins dead experts anew every
`reset_interval` steps; with `router_grad: smk` or `sml` the gate learns from `routing.surprise`
instead of the losses behind it, by `routing.learning`. A silent expert (down projection 0) is a
quiet part of the mean, never NaN; so is a token that no expert wants.

Legend: B rows, T tokens, N = B T, D width, P pairs of a token and an expert.
"""

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import Ctx, FeedForward, FeedForwardKind, Out, Reset, Site
from tinsmith.nn.routing.dispatch import combine, plan_of_mask
from tinsmith.nn.routing.experts import Activation, Experts
from tinsmith.nn.routing.gated import Gated
from tinsmith.nn.routing.learning import Learning, learn
from tinsmith.nn.routing.rebirth import births
from tinsmith.nn.routing.surprise import Listen, listen
from tinsmith.nn.routing.threshold import Choice, Gate, Threshold


@dataclass(frozen=True, kw_only=True)
class DynMoE(Threshold, Learning, FeedForwardKind):
    """`experts` of width `hidden`, each token with those above their thresholds."""

    kind: Literal["dyn_moe"] = "dyn_moe"
    hidden: Size
    activation: Activation = "swiglu"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_learning()
        if self.from_surprise and self.experts < 2:
            raise ValueError(f"router_grad={self.router_grad} compares experts; experts=1 is one")
        if self.hidden < 1:
            raise ValueError(f"hidden={self.hidden} must be at least 1")

    def build(self, site: Site) -> "DynMoEFeedForward":
        """The module."""
        return DynMoEFeedForward(self, site)


class DynMoEFeedForward(FeedForward, Gated):
    """The module of `DynMoE`."""

    def __init__(self, config: DynMoE, site: Site):
        super().__init__()
        self.config = config
        self.gate = Gate(config, site.dim, site.layer)
        self.experts = Experts(site.dim, config.experts, config.hidden, config.activation)
        # a compiler cannot make tensors that wait for a gradient; only here, as it loads one
        self._listen = cast(
            Listen, torch.compiler.disable(listen) if config.from_surprise else listen
        )

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) -> Out.y (B, T, D); stats and losses are the gate's."""
        x_ND = x.flatten(0, 1)
        choice = self.choose(x, ctx, learns=self.config.from_task)
        if self.training and torch.is_grad_enabled() and self.config.from_surprise:
            return self._listening(x, choice)
        plan = plan_of_mask(choice.mask_NE)
        weights_P = plan.weights(choice.weight_NE)
        y_ND = combine(self.experts(x_ND, plan), weights_P, plan, len(x_ND))
        return Out(y_ND.view_as(x), choice.losses, choice.stats)

    def _listening(self, x: Tensor, choice: Choice) -> Out:
        y_ND, probes = self._listen(
            self.experts,
            x.flatten(0, 1),
            choice.mask_NE,
            choice.weight_NE,
            self.config.wants_gradient,
        )
        losses = choice.losses | {"sdl": choice.losses["sdl"] + probes["share"]}
        return Out(y_ND.view_as(x), losses, choice.stats, probes)

    def after_backward(self, probes: dict[str, Tensor]) -> dict[str, Tensor]:
        """Where it was asked for, the gate learns from surprise."""
        return learn(self.config, self.gate, self.experts, probes) if probes else {}

    def post_step(self, stats: dict[str, Tensor]) -> list[Reset]:
        """Re-birth."""
        return self.gate.post_step(stats, births(self.experts))

    def flops(self) -> int:
        """Of a token that has as many experts as SDL asks for; at first it is half of all."""
        return self.gate.flops() + round(self.config.active * self.experts.flops())

    def idle_parameters(self) -> int:
        """Those of the experts that a token does not have, if it has as many as SDL asks for."""
        held = sum(parameter.numel() for parameter in self.experts.parameters())
        return round(held * (1 - self.config.active / self.config.experts))
