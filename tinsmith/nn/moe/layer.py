"""Sparse MoE feed-forward with a linear router, the base of `topk_moe` and `deepseek_moe`.

    y_n = sum over the K selected e of  w_ne f_e(x_n)  +  f_shared(x_n)

Several shared experts are one network of their summed width, which is the same function. `stats`
are sums over valid tokens: `load` (E,) pairs of each expert, `tokens` their number, `entropy` of
the router in nats, and in training each loss before its coefficient, times `tokens`.

Legend: B rows, T tokens of a row, N = B T, K selected experts of a token, E experts, D width.
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
    """An auxiliary loss before its coefficient, and the coefficient."""

    value: Tensor
    coef: float


def check_sizes(experts: int, top_k: int, hidden_dim: int, n_shared_experts: int) -> None:
    """Raise ValueError if sizes of an MoE layer are invalid."""
    for name, value in (("experts", experts), ("top_k", top_k), ("hidden_dim", hidden_dim)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if top_k > experts:
        raise ValueError(f"top_k={top_k} must be at most experts={experts}")
    if n_shared_experts < 0:
        raise ValueError(f"n_shared_experts={n_shared_experts} must be at least 0")


def check_coefficients(**coefficients: float) -> None:
    """Raise ValueError for a coefficient that is negative or NaN."""
    for name, value in coefficients.items():
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")


class SparseMoEFeedForward(FeedForward, Routed):
    """Base class; subclasses implement `route` and `aux_losses`."""

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
        shared_class = SHARED_EXPERTS[activation]
        self.shared = (
            shared_class(build_ctx.dim, n_shared_experts * hidden_dim) if n_shared_experts else None
        )

    def route(self, x_ND: Tensor) -> RouterOutput:
        """Return logits, probabilities, selected experts and weights of tokens (N, D)."""
        raise NotImplementedError

    def aux_losses(self, router_output: RouterOutput, valid_BT: Tensor) -> dict[str, AuxLoss]:
        """Return the auxiliary losses of one micro-batch by name."""
        raise NotImplementedError

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D), with `stats`, and in training `losses`."""
        x_ND, valid_BT = x.flatten(0, 1), _valid(x, ctx)
        routing = self.route(x_ND)
        plan = plan_from_indices(routing.expert_indices_NK, self.num_experts, valid_BT.flatten())
        y_PD = self.experts(x_ND, plan)
        y = combine(y_PD, plan.gather_weights(routing.weights_NK), plan, len(x_ND)).view_as(x)
        if self.shared is not None:
            y = y + self.shared(x, ctx).y
        losses = self.aux_losses(routing, valid_BT) if self.training else {}
        tokens = valid_BT.sum()
        entropy_N = entropy(routing.probabilities_NE.detach()).masked_fill(~valid_BT.flatten(), 0)
        stats = {"load": plan.load_E, "tokens": tokens, "entropy": entropy_N.sum()}
        stats |= {name: loss.value.detach() * tokens for name, loss in losses.items()}
        return Out(y, {name: loss.value * loss.coef for name, loss in losses.items()}, stats)

    @torch.no_grad()
    def expert_mask(self, x: Tensor, ctx: Ctx) -> Tensor:
        """Return which routed experts each token uses, (B, T, E) bool."""
        indices_BTK = self.route(x.flatten(0, 1)).expert_indices_NK.unflatten(0, x.shape[:2])
        selected_BTE = x.new_zeros(*x.shape[:2], self.num_experts, dtype=torch.bool)
        return selected_BTE.scatter(-1, indices_BTK, True) & _valid(x, ctx)[..., None]

    def flops(self) -> int:
        """Count the router, the selected experts and the shared experts."""
        shared = 0 if self.shared is None else self.shared.flops()
        return 2 * self.router.weight.numel() + self.top_k * self.experts.flops() + shared

    def inactive_parameters(self) -> int:
        """Count the parameters of the experts that a token does not use."""
        total = sum(parameter.numel() for parameter in self.experts.parameters())
        return total // self.num_experts * (self.num_experts - self.top_k)


def _valid(x: Tensor, ctx: Ctx) -> Tensor:
    """Return (B, T) bool; padding is neither routed nor counted."""
    if ctx.segments is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return ctx.segments >= 0
