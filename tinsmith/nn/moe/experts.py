"""A stack of small feed-forward networks (experts), each applied to the tokens routed to it.

    swiglu   f_e(x) = W_down (SiLU(W_gate x) * W_up x)      (Shazeer, 2002.05202)
    relu2    f_e(x) = W_down relu(W_up x)^2                 (So et al., 2109.08668)

Legend: N tokens, P pairs of token and expert, E experts, D width, H width of an expert.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.layers.linear import ExpertOutWeight, ExpertWeight
from tinsmith.nn.moe.dispatch import DispatchPlan
from tinsmith.nn.moe.grouped_gemm import autocast_operand, grouped_linear

Activation = Literal["swiglu", "relu2"]

GroupedMatmul = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`grouped_linear`, or a function that wraps it."""


class Experts(nn.Module):
    """Weights `gate_proj`, `up_proj` (E, H, D) and `down_proj` (E, D, H); `relu2` has no gate."""

    def __init__(self, dim: int, num_experts: int, hidden_dim: int, activation: Activation):
        super().__init__()
        self.gate_proj = (
            ExpertWeight(num_experts, dim, hidden_dim) if activation == "swiglu" else None
        )
        self.up_proj = ExpertWeight(num_experts, dim, hidden_dim)
        self.down_proj = ExpertOutWeight(num_experts, hidden_dim, dim)

    def forward(self, x_ND: Tensor, plan: DispatchPlan) -> Tensor:
        """Return the output of each pair's expert for its token, (P, D)."""
        inner_PH = self.intermediate(plan.gather(autocast_operand(x_ND)), plan.ends_E)
        return grouped_linear(inner_PH, self.down_proj.weight, plan.ends_E)

    def intermediate(
        self, x_PD: Tensor, ends_E: Tensor, matmul: GroupedMatmul = grouped_linear
    ) -> Tensor:
        """Return the input of the down projection, (P, H); `matmul` multiplies rows by expert
        weights.
        """
        up_PH = matmul(x_PD, self.up_proj.weight, ends_E)
        if self.gate_proj is None:
            return F.relu(up_PH).square()
        return F.silu(matmul(x_PD, self.gate_proj.weight, ends_E)) * up_PH

    def flops(self) -> int:
        """Count the FLOPs of one pair."""
        num_matrices = 2 if self.gate_proj is None else 3
        return 2 * num_matrices * self.up_proj.weight[0].numel()
