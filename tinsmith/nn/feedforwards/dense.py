"""Dense feed-forwards: configs of the networks in `nn.layers.mlp`.

swiglu   y = W_down (SiLU(W_gate x) * W_up x)      (Shazeer, 2002.05202)
relu2    y = W_down relu(W_up x)^2                 (So et al., 2109.08668)
"""

from dataclasses import dataclass
from typing import Literal

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, FeedForwardConfigBase
from tinsmith.nn.layers.mlp import ReLU2FeedForward, SwiGLUFeedForward


@dataclass(frozen=True, kw_only=True)
class SwiGLU(FeedForwardConfigBase):
    """Gated feed-forward of width `hidden_dim`."""

    kind: Literal["swiglu"] = "swiglu"
    hidden_dim: Size
    bias: bool = False

    def __post_init__(self) -> None:
        _check_hidden_dim(self.hidden_dim)

    def build(self, build_ctx: BuildContext) -> SwiGLUFeedForward:
        """Build the module."""
        return SwiGLUFeedForward(build_ctx.dim, self.hidden_dim, self.bias)


@dataclass(frozen=True, kw_only=True)
class ReLU2(FeedForwardConfigBase):
    """Feed-forward of width `hidden_dim` with a squared ReLU."""

    kind: Literal["relu2"] = "relu2"
    hidden_dim: Size
    bias: bool = False

    def __post_init__(self) -> None:
        _check_hidden_dim(self.hidden_dim)

    def build(self, build_ctx: BuildContext) -> ReLU2FeedForward:
        """Build the module."""
        return ReLU2FeedForward(build_ctx.dim, self.hidden_dim, self.bias)


def _check_hidden_dim(hidden_dim: int) -> None:
    if hidden_dim < 1:
        raise ValueError(f"hidden_dim={hidden_dim} must be at least 1")
