"""DeepSeek's experts: many small ones, balanced by a bias instead of a loss (2401.06066,
2408.15664, DeepSeek-V3 2412.19437).

    s = sigmoid(W x), or softmax(W x)      chosen: the K best of s + b, of the `kept_groups` best
    w = scale s / sum of the chosen s                                   of `groups` equal groups

The bias b chooses and never weighs. No gradient reaches it; after every optimizer step it moves by
`bias_rate` against the load that the experts had in the global batch; casts leave it in at least
float32. In training, `noise` s multiplies each logit by a number drawn evenly from 1 - s/2 to
1 + s/2 (Tiny-R2), and the `balance` loss holds the unbiased choice of every row
(`routing.balance.sequence`). With K = 1 the raw score counts: a weight of 1 would teach the gate
nothing.

Legend: B rows, T tokens of a row, N = B T, K choices of a token, E experts, D width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import FeedForwardKind, Reset, Site
from tinsmith.nn.parts.choose import decided, top
from tinsmith.nn.parts.exact import Exact
from tinsmith.nn.routing.balance import push, sequence
from tinsmith.nn.routing.experts import Activation
from tinsmith.nn.routing.gates import Route, weights_of, within_groups
from tinsmith.nn.routing.layer import ChosenExperts, Cost, check_coefficients, check_sizes


@dataclass(frozen=True, kw_only=True)
class DeepSeekMoE(FeedForwardKind):
    """`top_k` of `experts` of width `hidden`, and `shared` ones that every token meets."""

    kind: Literal["deepseek_moe"] = "deepseek_moe"
    experts: Size = 8
    top_k: Size = 2
    hidden: Size
    shared: Size = 1
    activation: Activation = "swiglu"
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalise: bool = True
    scale: float = 1.0
    groups: Size = 1
    kept_groups: Size | None = None  # null: all of them
    bias_rate: float = 0.001
    balance_weight: float = 0.0001
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self.experts, self.top_k, self.hidden, self.shared)
        check_coefficients(
            bias_rate=self.bias_rate, balance_weight=self.balance_weight, noise=self.noise
        )
        if self.noise > 2:
            raise ValueError(f"noise={self.noise} must be at most 2: more turns signs of logits")
        if not self.scale > 0:
            raise ValueError(f"scale={self.scale} must be above 0")
        if self.groups < 1 or self.experts % self.groups:
            raise ValueError(f"groups={self.groups} must divide experts={self.experts}")
        if not 1 <= self.kept <= self.groups:
            raise ValueError(f"kept_groups={self.kept} must be from 1 to groups={self.groups}")
        within = self.kept * (self.experts // self.groups)
        if self.top_k > within:
            raise ValueError(f"top_k={self.top_k} is more than the {within} experts of kept_groups")

    @property
    def kept(self) -> int:
        """How many groups a token may choose from."""
        return self.groups if self.kept_groups is None else self.kept_groups

    def build(self, site: Site) -> "DeepSeekFeedForward":
        """The module."""
        return DeepSeekFeedForward(self, site)


class DeepSeekFeedForward(Exact, ChosenExperts):
    """The module of `DeepSeekMoE`."""

    EXACT: ClassVar = ("bias",)
    bias: Tensor

    def __init__(self, config: DeepSeekMoE, site: Site):
        sizes = (config.experts, config.top_k, config.hidden, config.shared)
        super().__init__(site, *sizes, config.activation)
        self.config = config
        self.register_buffer("bias", torch.zeros(config.experts))

    def route(self, x_ND: Tensor) -> Route:
        """By score and bias."""
        config, logits_NE = self.config, self.router(x_ND)
        if self.training and config.noise:
            logits_NE = logits_NE * (1 + config.noise * (torch.rand_like(logits_NE) - 0.5))
        if config.score == "softmax":
            scores_NE = probabilities_NE = logits_NE.softmax(-1)
        else:
            scores_NE = logits_NE.sigmoid()
            probabilities_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        open_NE = within_groups(scores_NE.detach() + self.bias, config.groups, config.kept)
        choices_NK = decided(top(open_NE, self.top_k))
        weights_NK = config.scale * weights_of(scores_NE, choices_NK, config.renormalise)
        return Route(logits_NE, probabilities_NE, choices_NK, weights_NK)

    def costs(self, route: Route, valid_BT: Tensor) -> dict[str, Cost]:
        """`balance`, of what would be chosen without the bias."""
        probabilities_BTE = route.probabilities_NE.unflatten(0, valid_BT.shape)
        value = sequence(probabilities_BTE, top(probabilities_BTE, self.top_k), valid_BT)
        return {"balance": Cost(value, self.config.balance_weight)}

    def watched(self) -> dict[str, Tensor]:
        """The bias."""
        return {"bias": self.bias}

    @torch.no_grad()
    def post_step(self, stats: dict[str, Tensor]) -> list[Reset]:
        """The bias moves against the load of the global batch; that of a frozen gate stays."""
        if self.router.weight.requires_grad:
            push(self.bias, stats["load"], self.config.bias_rate)
        return []
