"""A feed-forward of experts that a linear gate chooses: what `topk_moe` and `deepseek_moe` share.

    y_n = sum over the K chosen e of  w_ne f_e(x_n)  +  f_shared(x_n)

Several shared experts are one of their summed width, which is the same function. What is added up
in `stats`, over valid tokens: `load` (E,) pairs of each expert, `tokens` how many there were,
`entropy` of the gate in nats, and in training each loss before its coefficient, times `tokens`.

Legend: B rows, T tokens of a row, N = B T, K choices of a token, E experts, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.contract import BuildContext, Ctx, FeedForward, Out, Routed
from tinsmith.nn.layers.mlp import ReLU2FeedForward, SwiGLUFeedForward
from tinsmith.nn.moe.dispatch import combine, plan_from_indices
from tinsmith.nn.moe.experts import Activation, Experts
from tinsmith.nn.moe.router import RouterLinear, RouterOutput, entropy

SHARED_EXPERTS = {"swiglu": SwiGLUFeedForward, "relu2": ReLU2FeedForward}


class AuxLoss(NamedTuple):
    """A loss before and its coefficient."""

    value: Tensor
    coef: float


def check_sizes(experts: int, top_k: int, hidden_dim: int, n_shared_experts: int) -> None:
    """ValueError where such a layer cannot be built."""
    for name, value in (("experts", experts), ("top_k", top_k), ("hidden_dim", hidden_dim)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if top_k > experts:
        raise ValueError(f"top_k={top_k} must be at most experts={experts}")
    if n_shared_experts < 0:
        raise ValueError(f"n_shared_experts={n_shared_experts} must be at least 0")


def check_coefficients(**coefficients: float) -> None:
    """ValueError for one below 0, or not a number."""
    for name, value in coefficients.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")


class SparseMoEFeedForward(FeedForward, Routed):
    """Needs `route`, and `costs` for what the gate is to learn beside the task."""

    def __init__(
        self,
        build_ctx: BuildContext,
        num_experts: int,
        top_k: int,
        hidden_dim: int,
        n_shared_experts: int,
        activation: Activation,
    ):
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.router = RouterLinear(build_ctx.dim, num_experts)
        self.experts = Experts(build_ctx.dim, num_experts, hidden_dim, activation)
        dense = SHARED_EXPERTS[activation]
        self.shared = (
            dense(build_ctx.dim, n_shared_experts * hidden_dim) if n_shared_experts else None
        )

    def route(self, x_ND: Tensor) -> RouterOutput:
        """What the gate says of each token."""
        raise NotImplementedError

    def aux_losses(self, router_output: RouterOutput, valid_BT: Tensor) -> dict[str, AuxLoss]:
        """The losses of one training step by name."""
        raise NotImplementedError

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) -> Out.y (B, T, D), `losses` in training, `stats`."""
        x_ND, valid_BT = x.flatten(0, 1), _valid(x, ctx)
        route = self.route(x_ND)
        plan = plan_from_indices(route.expert_indices_NK, self.num_experts, valid_BT.flatten())
        y_PD = self.experts(x_ND, plan)
        y = combine(y_PD, plan.gather_weights(route.weights_NK), plan, len(x_ND)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, ctx).y
        costs = self.aux_losses(route, valid_BT) if self.training else {}
        tokens = valid_BT.sum()
        unsure_N = entropy(route.probabilities_NE.detach()).masked_fill(~valid_BT.flatten(), 0)
        stats = {"load": plan.load_E, "tokens": tokens, "entropy": unsure_N.sum()}
        stats |= {name: cost.value.detach() * tokens for name, cost in costs.items()}
        return Out(y, {name: cost.value * cost.coef for name, cost in costs.items()}, stats)

    @torch.no_grad()
    def expert_mask(self, x: Tensor, ctx: Ctx) -> Tensor:
        """(B, T, E) bool: which routed experts work on which tokens."""
        choices_BTK = self.route(x.flatten(0, 1)).expert_indices_NK.unflatten(0, x.shape[:2])
        chosen_BTE = x.new_zeros(*x.shape[:2], self.num_experts, dtype=torch.bool)
        return chosen_BTE.scatter(-1, choices_BTK, True) & _valid(x, ctx)[..., None]

    def flops(self) -> int:
        """The gate, the chosen experts, the shared ones."""
        shared = 0 if self.shared is None else self.shared.flops()
        return 2 * self.router.weight.numel() + self.top_k * self.experts.flops() + shared

    def inactive_parameters(self) -> int:
        """Those of the experts that a token did not choose."""
        held = sum(parameter.numel() for parameter in self.experts.parameters())
        return held // self.num_experts * (self.num_experts - self.top_k)


def _valid(x: Tensor, ctx: Ctx) -> Tensor:
    """(B, T) bool: padding is never routed nor counted."""
    if ctx.segments is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return ctx.segments >= 0
