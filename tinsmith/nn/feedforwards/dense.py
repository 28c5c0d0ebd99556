"""Dense feed-forwards.

swiglu   y = W_down (SiLU(W_gate x) * W_up x)      (Shazeer, 2002.05202)
relu2    y = W_down relu(W_up x)^2                 (So et al., 2109.08668)
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.contract import Ctx, FeedForward, FeedForwardKind, Out, Site
from tinsmith.nn.parts.init import Output


@dataclass(frozen=True, kw_only=True)
class SwiGLU(FeedForwardKind):
    """Gated feed-forward of width `hidden`."""

    kind: Literal["swiglu"] = "swiglu"
    hidden: Size
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self.hidden)

    def build(self, site: Site) -> "SwiGLUFeedForward":
        """The module."""
        return SwiGLUFeedForward(self, site)


@dataclass(frozen=True, kw_only=True)
class ReLU2(FeedForwardKind):
    """Feed-forward of width `hidden` with a squared ReLU."""

    kind: Literal["relu2"] = "relu2"
    hidden: Size
    bias: bool = False

    def __post_init__(self) -> None:
        _positive(self.hidden)

    def build(self, site: Site) -> "ReLU2FeedForward":
        """The module."""
        return ReLU2FeedForward(self, site)


class SwiGLUFeedForward(FeedForward):
    """The module of `SwiGLU`."""

    def __init__(self, config: SwiGLU, site: Site):
        super().__init__()
        self.gate_proj = nn.Linear(site.dim, config.hidden, bias=config.bias)
        self.up_proj = nn.Linear(site.dim, config.hidden, bias=config.bias)
        self.down_proj = Output(config.hidden, site.dim, bias=config.bias)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) -> Out.y (B, T, D)."""
        return Out(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))

    def flops(self) -> int:
        """Three products."""
        return 6 * self.gate_proj.in_features * self.gate_proj.out_features


class ReLU2FeedForward(FeedForward):
    """The module of `ReLU2`."""

    def __init__(self, config: ReLU2, site: Site):
        super().__init__()
        self.up_proj = nn.Linear(site.dim, config.hidden, bias=config.bias)
        self.down_proj = Output(config.hidden, site.dim, bias=config.bias)

    def forward(self, x: Tensor, ctx: Ctx) -> Out:
        """x (B, T, D) -> Out.y (B, T, D)."""
        return Out(self.down_proj(F.relu(self.up_proj(x)).square()))

    def flops(self) -> int:
        """Two products."""
        return 4 * self.up_proj.in_features * self.up_proj.out_features


def _positive(hidden: int) -> None:
    if hidden < 1:
        raise ValueError(f"hidden={hidden} must be at least 1")
