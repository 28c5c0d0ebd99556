"""The plain residual connection: one stream, h + y (He et al., 1512.03385)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tinsmith.nn.contract import BuildContext, Residual, ResidualConfigBase


@dataclass(frozen=True, kw_only=True)
class Plain(ResidualConfigBase):
    """One residual stream to which every sub-layer adds its output."""

    kind: Literal["plain"] = "plain"

    def build(self, build_ctx: BuildContext) -> "PlainResidual":
        """Build the module."""
        return PlainResidual()

    def expand(self, x: Tensor) -> Tensor:
        """Return x, which is the stream."""
        return x

    def collapse(self, h: Tensor) -> Tensor:
        """Return h, which is the output."""
        return h


class PlainResidual(Residual):
    """The module of `Plain`."""

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """Return the stream (B, T, D) as the input of the sub-layer."""
        return h, None

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """Return h + y."""
        return h + y

    def flops(self) -> int:
        """Return 0: there is no matrix product."""
        return 0

    def activation_bytes(self) -> int:
        """Return 0: a sum saves nothing for backward."""
        return 0
