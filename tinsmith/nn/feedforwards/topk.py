"""Experts behind a softmax gate: MiniMind's, Mixtral's (2401.04088) and Qwen3's.

    p = softmax(W x);  select the K largest;  w = p, or p / their sum with `norm_topk_prob`

With K = 1 the raw probability counts whatever `norm_topk_prob` says: a weight of 1 would teach the
gate nothing. Losses in training: `balance` (`moe.balance`) and, where `z_weight` is not 0,
`router_z`. They are means over one micro-batch, by definition.

Legend: B rows, T tokens of a row, N = B T, K choices of a token, E experts, D width.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, FeedForwardConfigBase
from tinsmith.nn.layers.stable_topk import must_save, stable_topk
from tinsmith.nn.moe.balance import BALANCE_LOSSES, z_loss
from tinsmith.nn.moe.experts import Activation
from tinsmith.nn.moe.layer import AuxLoss, SparseMoEFeedForward, check_coefficients, check_sizes
from tinsmith.nn.moe.router import RouterOutput, combine_weights


@dataclass(frozen=True, kw_only=True)
class TopKMoE(FeedForwardConfigBase):
    """`top_k` of `experts` of width `hidden_dim`, and `n_shared_experts` ones that every token
    meets.
    """

    kind: Literal["topk_moe"] = "topk_moe"
    experts: Size = 4
    top_k: Size = 2
    hidden_dim: Size
    n_shared_experts: Size = 0
    activation: Activation = "swiglu"
    norm_topk_prob: bool = True
    balance: Literal["switch", "sequence", "squared", "none"] = "switch"
    balance_weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self.experts, self.top_k, self.hidden_dim, self.n_shared_experts)
        check_coefficients(balance_weight=self.balance_weight, z_weight=self.z_weight)

    def build(self, build_ctx: BuildContext) -> "TopKFeedForward":
        """Build the module."""
        return TopKFeedForward(self, build_ctx)


class TopKFeedForward(SparseMoEFeedForward):
    """The module of `TopKMoE`."""

    def __init__(self, config: TopKMoE, build_ctx: BuildContext):
        sizes = (config.experts, config.top_k, config.hidden_dim, config.n_shared_experts)
        super().__init__(build_ctx, *sizes, config.activation)
        self.config = config

    def route(self, x_ND: Tensor) -> RouterOutput:
        """Select experts by probability."""
        logits_NE = self.router(x_ND)
        probabilities_NE = logits_NE.softmax(-1)
        choices_NK = must_save(stable_topk(probabilities_NE, self.top_k))
        weights_NK = combine_weights(probabilities_NE, choices_NK, self.config.norm_topk_prob)
        return RouterOutput(logits_NE, probabilities_NE, choices_NK, weights_NK)

    def aux_losses(self, router_output: RouterOutput, valid_BT: Tensor) -> dict[str, AuxLoss]:
        """`balance` and `router_z`, as asked for."""
        config, shape = self.config, valid_BT.shape
        costs: dict[str, AuxLoss] = {}
        if config.balance != "none":
            probabilities_BTE = router_output.probabilities_NE.unflatten(0, shape)
            choices_BTK = router_output.expert_indices_NK.unflatten(0, shape)
            value = BALANCE_LOSSES[config.balance](probabilities_BTE, choices_BTK, valid_BT)
            costs["balance"] = AuxLoss(value, config.balance_weight)
        if config.z_weight:
            value = z_loss(router_output.logits_NE.unflatten(0, shape), valid_BT)
            costs["router_z"] = AuxLoss(value, config.z_weight)
        return costs
