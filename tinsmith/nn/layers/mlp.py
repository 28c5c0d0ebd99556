"""Dense feed-forward networks (MLPs).

    SwiGLU   y = W_down (SiLU(W_gate x) * W_up x)      (Shazeer, 2002.05202)
    ReLU^2   y = W_down relu(W_up x)^2                 (So et al., 2109.08668)

Legend: B rows, T tokens, D width.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.nn.contract import Ctx, FeedForward, Out, TensorSplit
from tinsmith.nn.layers.linear import ResidualProj


class SwiGLUFeedForward(FeedForward):
    """Gated feed-forward with two up projections and one down projection."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = ResidualProj(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        return Out(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    def flops(self) -> int:
        """Count the three matrix products."""
        return 6 * self.gate_proj.in_features * self.gate_proj.out_features

    def tensor_plan(self) -> dict[str, TensorSplit]:
        """Split the hidden width."""
        return {"gate_proj": "column", "up_proj": "column", "down_proj": "row"}


class ReLU2FeedForward(FeedForward):
    """Feed-forward with a squared ReLU, one up projection and one down projection."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False):
        super().__init__()
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = ResidualProj(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """Map x (B, T, D) to Out.y (B, T, D)."""
        return Out(self.down_proj(F.relu(self.up_proj(x)).square()))

    def flops(self) -> int:
        """Count the two matrix products."""
        return 4 * self.up_proj.in_features * self.up_proj.out_features

    def tensor_plan(self) -> dict[str, TensorSplit]:
        """Split the hidden width."""
        return {"up_proj": "column", "down_proj": "row"}
