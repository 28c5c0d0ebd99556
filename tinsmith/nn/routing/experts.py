"""A stack of small feed-forwards, each run on the tokens that chose it.

    swiglu   f_e(x) = W_down (SiLU(W_gate x) * W_up x)      (Shazeer, 2002.05202)
    relu2    f_e(x) = W_down relu(W_up x)^2                 (So et al., 2109.08668)

Legend: N tokens, P pairs, E experts, D width, H width of an expert.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.parts.grouped import grouped, lowered
from tinsmith.nn.parts.init import OutputStack, Stack
from tinsmith.nn.routing.dispatch import Plan

Activation = Literal["swiglu", "relu2"]
Product = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`grouped`, or one that does more."""


class Experts(nn.Module):
    """`gate_proj` and `up_proj` (E, H, D), `down_proj` (E, D, H); `relu2` has no `gate_proj`."""

    def __init__(self, dim: int, experts: int, hidden: int, activation: Activation):
        super().__init__()
        self.gate_proj = Stack(experts, dim, hidden) if activation == "swiglu" else None
        self.up_proj = Stack(experts, dim, hidden)
        self.down_proj = OutputStack(experts, hidden, dim)

    def forward(self, x_ND: Tensor, plan: Plan) -> Tensor:
        """(P, D): of each pair what its expert says to its token."""
        inner_PH = self.inner(plan.gather(lowered(x_ND)), plan.ends_E)
        return grouped(inner_PH, self.down_proj.weight, plan.ends_E)

    def inner(self, x_PD: Tensor, ends_E: Tensor, product: Product = grouped) -> Tensor:
        """(P, H): what the down projection is given. `product` is how rows meet their matrices."""
        up_PH = product(x_PD, self.up_proj.weight, ends_E)
        if self.gate_proj is None:
            return F.relu(up_PH).square()
        return F.silu(product(x_PD, self.gate_proj.weight, ends_E)) * up_PH

    def flops(self) -> int:
        """Floating-point operations of one pair."""
        matrices = 2 if self.gate_proj is None else 3
        return 2 * matrices * self.up_proj.weight[0].numel()
