"""Experts behind a softmax gate: MiniMind's, Mixtral's (2401.04088) and Qwen3's.

    p = softmax(W x);  the K largest are chosen, w = p, or p / sum of the chosen p (`renormalise`)

With K = 1 the raw probability counts whatever `renormalise` says: a weight of 1 would teach the
gate nothing. Losses in training: `balance` (`routing.balance`) and, where `z_weight` is not 0,
`router_z`. They are means over one micro-batch, by definition.

Legend: B rows, T tokens of a row, N = B T, K choices of a token, E experts, D width.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import FeedForwardKind, Site
from tinsmith.nn.parts.choose import decided, top
from tinsmith.nn.routing.balance import LOSSES, z_loss
from tinsmith.nn.routing.experts import Activation
from tinsmith.nn.routing.gates import Route, weights_of
from tinsmith.nn.routing.layer import ChosenExperts, Cost, check_coefficients, check_sizes


@dataclass(frozen=True, kw_only=True)
class TopKMoE(FeedForwardKind):
    """`top_k` of `experts` of width `hidden`, and `shared` ones that every token meets."""

    kind: Literal["topk_moe"] = "topk_moe"
    experts: Size = 4
    top_k: Size = 2
    hidden: Size
    shared: Size = 0
    activation: Activation = "swiglu"
    renormalise: bool = True
    balance: Literal["switch", "sequence", "squared", "none"] = "switch"
    balance_weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self.experts, self.top_k, self.hidden, self.shared)
        check_coefficients(balance_weight=self.balance_weight, z_weight=self.z_weight)

    def build(self, site: Site) -> "TopKFeedForward":
        """The module."""
        return TopKFeedForward(self, site)


class TopKFeedForward(ChosenExperts):
    """The module of `TopKMoE`."""

    def __init__(self, config: TopKMoE, site: Site):
        sizes = (config.experts, config.top_k, config.hidden, config.shared)
        super().__init__(site, *sizes, config.activation)
        self.config = config

    def route(self, x_ND: Tensor) -> Route:
        """By probability."""
        logits_NE = self.router(x_ND)
        probabilities_NE = logits_NE.softmax(-1)
        choices_NK = decided(top(probabilities_NE, self.top_k))
        weights_NK = weights_of(probabilities_NE, choices_NK, self.config.renormalise)
        return Route(logits_NE, probabilities_NE, choices_NK, weights_NK)

    def costs(self, route: Route, valid_BT: Tensor) -> dict[str, Cost]:
        """`balance` and `router_z`, as asked for."""
        config, shape = self.config, valid_BT.shape
        costs: dict[str, Cost] = {}
        if config.balance != "none":
            probabilities_BTE = route.probabilities_NE.unflatten(0, shape)
            choices_BTK = route.choices_NK.unflatten(0, shape)
            value = LOSSES[config.balance](probabilities_BTE, choices_BTK, valid_BT)
            costs["balance"] = Cost(value, config.balance_weight)
        if config.z_weight:
            value = z_loss(route.logits_NE.unflatten(0, shape), valid_BT)
            costs["router_z"] = Cost(value, config.z_weight)
        return costs
