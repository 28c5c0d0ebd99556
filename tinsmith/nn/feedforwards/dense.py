"""Dense feed-forwards.

swiglu   y = W_down (SiLU(W_gate x) * W_up x)      (Shazeer, 2002.05202)
relu2    y = W_down relu(W_up x)^2                 (So et al., 2109.08668)
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, Ctx, FeedForward, FeedForwardConfigBase, Out
from tinsmith.nn.layers.init import ResidualProj


@dataclass(frozen=True, kw_only=True)
class SwiGLU(FeedForwardConfigBase):
    """Gated feed-forward of width `hidden_dim`."""

    kind: Literal["swiglu"] = "swiglu"
    hidden_dim: Size
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self.hidden_dim)

    def build(self, build_ctx: BuildContext) -> "SwiGLUFeedForward":
        """The module."""
        return SwiGLUFeedForward(self, build_ctx)


@dataclass(frozen=True, kw_only=True)
class ReLU2(FeedForwardConfigBase):
    """Feed-forward of width `hidden_dim` with a squared ReLU."""

    kind: Literal["relu2"] = "relu2"
    hidden_dim: Size
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self.hidden_dim)

    def build(self, build_ctx: BuildContext) -> "ReLU2FeedForward":
        """The module."""
        return ReLU2FeedForward(self, build_ctx)


class SwiGLUFeedForward(FeedForward):
    """The module of `SwiGLU`."""

    def __init__(self, config: SwiGLU, build_ctx: BuildContext):
        super().__init__()
        self.gate_proj = nn.Linear(build_ctx.dim, config.hidden_dim, bias=config.bias)
        self.up_proj = nn.Linear(build_ctx.dim, config.hidden_dim, bias=config.bias)
        self.down_proj = ResidualProj(config.hidden_dim, build_ctx.dim, bias=config.bias)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) -> Out.y (B, T, D)."""
        return Out(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    def flops(self) -> int:
        """Three products."""
        return 6 * self.gate_proj.in_features * self.gate_proj.out_features


class ReLU2FeedForward(FeedForward):
    """The module of `ReLU2`."""

    def __init__(self, config: ReLU2, build_ctx: BuildContext):
        super().__init__()
        self.up_proj = nn.Linear(build_ctx.dim, config.hidden_dim, bias=config.bias)
        self.down_proj = ResidualProj(config.hidden_dim, build_ctx.dim, bias=config.bias)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) -> Out.y (B, T, D)."""
        return Out(self.down_proj(F.relu(self.up_proj(x)).square()))

    def flops(self) -> int:
        """Two products."""
        return 4 * self.up_proj.in_features * self.up_proj.out_features


def _positive(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden_dim={hidden} must be at least 1")
