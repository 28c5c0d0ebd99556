"""Sparse MoE with a softmax router and top-k selection: MiniMind, Mixtral (2401.04088), Qwen3.

    p = softmax(W x);  select the K largest;  w = p, or p / their sum with `norm_topk_prob`

With K = 1 the weight is the raw probability even with `norm_topk_prob`, because a constant weight
of 1 would give the router no gradient. Losses in training: `balance` (`moe.balance`) and, if
`z_weight` is not 0, `router_z`. They are means over one micro-batch by definition.

Legend: B rows, T tokens of a row, N = B T, K selected experts of a token, E experts, D width.
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
    """Sparse MoE: `top_k` of `experts` of width `hidden_dim`, and `n_shared_experts` for every
    token.
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
        indices_NK = must_save(stable_topk(probabilities_NE, self.top_k))
        weights_NK = combine_weights(probabilities_NE, indices_NK, self.config.norm_topk_prob)
        return RouterOutput(logits_NE, probabilities_NE, indices_NK, weights_NK)

    def aux_losses(self, router_output: RouterOutput, valid_BT: Tensor) -> dict[str, AuxLoss]:
        """Return the losses `balance` and `router_z`, if enabled."""
        config, shape = self.config, valid_BT.shape
        losses: dict[str, AuxLoss] = {}
        if config.balance != "none":
            probabilities_BTE = router_output.probabilities_NE.unflatten(0, shape)
            indices_BTK = router_output.expert_indices_NK.unflatten(0, shape)
            value = BALANCE_LOSSES[config.balance](probabilities_BTE, indices_BTK, valid_BT)
            losses["balance"] = AuxLoss(value, config.balance_weight)
        if config.z_weight:
            value = z_loss(router_output.logits_NE.unflatten(0, shape), valid_BT)
            losses["router_z"] = AuxLoss(value, config.z_weight)
        return losses
