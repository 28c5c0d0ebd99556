"""DeepSeekMoE: many small experts, balanced by a bias on the routing scores instead of a loss
(2401.06066, 2408.15664, DeepSeek-V3 2412.19437).

    s = sigmoid(W x), or softmax(W x)
    selected: the K best of s + b, within the `topk_group` best of `n_group` equal groups
    w = routed_scaling_factor s / sum of the selected s

The bias b affects the selection, not the weights. It has no gradient; after every optimizer step it
moves by `bias_update_speed` against the load of the experts in the global batch. Casts keep it in
at least float32. In training, `noise` s multiplies each logit by a uniform random number from 1 -
s/2 to 1 + s/2 (Tiny-R2), and the loss `balance` balances the selection without bias within every
row (`moe.balance.sequence_loss`). With K = 1 the weight is the raw score, because a constant weight
of 1 would give the router no gradient.

Legend: B rows, T tokens of a row, N = B T, K selected experts of a token, E experts, D width.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, FeedForwardConfigBase, OptimizerReset
from tinsmith.nn.layers.stable_topk import must_save, stable_topk
from tinsmith.nn.moe.balance import sequence_loss, update_bias
from tinsmith.nn.moe.experts import Activation
from tinsmith.nn.moe.layer import AuxLoss, SparseMoEFeedForward, check_coefficients, check_sizes
from tinsmith.nn.moe.router import RouterOutput, combine_weights, group_limited_scores
from tinsmith.nn.precision import Fp32Params


@dataclass(frozen=True, kw_only=True)
class DeepSeekMoE(FeedForwardConfigBase):
    """Sparse MoE: `top_k` of `experts` of width `hidden_dim`, and `n_shared_experts` for every
    token.
    """

    kind: Literal["deepseek_moe"] = "deepseek_moe"
    experts: Size = 8
    top_k: Size = 2
    hidden_dim: Size
    n_shared_experts: Size = 1
    activation: Activation = "swiglu"
    score: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: Size = 1
    topk_group: Size | None = None  # null: all of them
    bias_update_speed: float = 0.001
    balance_weight: float = 0.0001
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_sizes(self.experts, self.top_k, self.hidden_dim, self.n_shared_experts)
        check_coefficients(
            bias_update_speed=self.bias_update_speed,
            balance_weight=self.balance_weight,
            noise=self.noise,
        )
        if self.noise > 2:
            raise ValueError(
                f"noise={self.noise} must be at most 2: more changes the signs of logits"
            )
        if not self.routed_scaling_factor > 0:
            raise ValueError(f"routed_scaling_factor={self.routed_scaling_factor} must be above 0")
        if self.n_group < 1 or self.experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} must divide experts={self.experts}")
        if not 1 <= self.num_topk_groups <= self.n_group:
            raise ValueError(
                f"topk_group={self.num_topk_groups} must be from 1 to n_group={self.n_group}"
            )
        num_candidates = self.num_topk_groups * (self.experts // self.n_group)
        if self.top_k > num_candidates:
            raise ValueError(
                f"top_k={self.top_k} is more than the {num_candidates} experts of topk_group"
            )

    @property
    def num_topk_groups(self) -> int:
        """The number of groups from which a token selects experts."""
        return self.n_group if self.topk_group is None else self.topk_group

    def build(self, build_ctx: BuildContext) -> "DeepSeekFeedForward":
        """Build the module."""
        return DeepSeekFeedForward(self, build_ctx)


class DeepSeekFeedForward(Fp32Params, SparseMoEFeedForward):
    """The module of `DeepSeekMoE`."""

    FP32_PARAMS: ClassVar = ("bias",)
    bias: Tensor

    def __init__(self, config: DeepSeekMoE, build_ctx: BuildContext):
        sizes = (config.experts, config.top_k, config.hidden_dim, config.n_shared_experts)
        super().__init__(build_ctx, *sizes, config.activation)
        self.config = config
        self.register_buffer("bias", torch.zeros(config.experts))

    def route(self, x_ND: Tensor) -> RouterOutput:
        """Select experts by score and bias."""
        config, logits_NE = self.config, self.router(x_ND)
        if self.training and config.noise:
            logits_NE = logits_NE * (1 + config.noise * (torch.rand_like(logits_NE) - 0.5))
        if config.score == "softmax":
            scores_NE = probabilities_NE = logits_NE.softmax(-1)
        else:
            scores_NE = logits_NE.sigmoid()
            probabilities_NE = scores_NE / (scores_NE.sum(-1, keepdim=True) + 1e-20)
        limited_NE = group_limited_scores(
            scores_NE.detach() + self.bias, config.n_group, config.num_topk_groups
        )
        indices_NK = must_save(stable_topk(limited_NE, self.top_k))
        weights_NK = config.routed_scaling_factor * combine_weights(
            scores_NE, indices_NK, config.norm_topk_prob
        )
        return RouterOutput(logits_NE, probabilities_NE, indices_NK, weights_NK)

    def aux_losses(self, router_output: RouterOutput, valid_BT: Tensor) -> dict[str, AuxLoss]:
        """Return `balance`, the loss of the selection without bias."""
        probabilities_BTE = router_output.probabilities_NE.unflatten(0, valid_BT.shape)
        value = sequence_loss(
            probabilities_BTE, stable_topk(probabilities_BTE, self.top_k), valid_BT
        )
        return {"balance": AuxLoss(value, self.config.balance_weight)}

    def router_state(self) -> dict[str, Tensor]:
        """Return the balancing bias."""
        return {"bias": self.bias}

    @torch.no_grad()
    def post_step(self, stats: dict[str, Tensor]) -> list[OptimizerReset]:
        """Move the bias against the load of the global batch, unless the router is frozen."""
        if self.router.weight.requires_grad:
            update_bias(self.bias, stats["load"], self.config.bias_update_speed)
        return []
