"""The plain residual: one stream, h + y (He et al., 1512.03385)."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from tinsmith.nn.contract import BuildContext, Residual, ResidualConfigBase


@dataclass(frozen=True, kw_only=True)
class Plain(ResidualConfigBase):
    """One stream that every sub-layer adds to."""

    kind: Literal["plain"] = "plain"

    def build(self, build_ctx: BuildContext) -> "PlainResidual":
        """Build the module."""
        return PlainResidual()

    def expand(self, x: Tensor) -> Tensor:
        """The stream is x."""
        return x

    def collapse(self, h: Tensor) -> Tensor:
        """The stream is what comes out."""
        return h


class PlainResidual(Residual):
    """The module of `Plain`."""

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """(B, T, D) -> itself."""
        return h, None

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """h + y."""
        return h + y

    def flops(self) -> int:
        """Return 0: there is no matrix product."""
        return 0

    def activation_bytes(self) -> int:
        """A sum keeps nothing."""
        return 0
