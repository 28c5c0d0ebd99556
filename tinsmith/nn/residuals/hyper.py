"""Hyper-Connections (Zhu et al., 2409.19606), with frac-connections (Zhu et al., 2503.14125).

    x = A_m^T H      H' = A_r^T H + B^T F(x)      H in R^{n x D}, n copies of the embedding at first
    [A_m | A_r] = s_a tanh(N W) + static,  B = s_b tanh(N W) + static,  N = RMSNorm(H) per stream

`dynamic: false` leaves the static terms alone. With `fracs: m` every stream is cut into m pieces of
D / m numbers; A_m mixes the P = n m pieces into the m pieces of x, A_r into each other, and B says
what every piece of F(x) adds to every stream's pieces. At first W = 0, s = 0.01, A_r = I, B adds to
every stream what was said, and A_m takes stream (sub-layer mod n): the pre-norm residual, exactly.

Differs from the papers: the norm has no gain (W learns it anyway); streams end in their mean, not
their sum, which the final norm does not see but for its epsilon; B may take a piece of F(x) to
another piece of a stream (2503.14125 keeps them apart, as B does here at first); fractions of one
stream alone (its n = 1) are not offered.

Legend: B rows, T tokens, D width, n streams, P pieces of the state, F fracs, C = F + P + F numbers
per piece.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, Residual
from tinsmith.nn.precision import at_least_fp32, no_autocast
from tinsmith.nn.residuals.streams import (
    MultiStreamConfigBase,
    add_to_streams,
    mix_streams,
    mixing_flops,
    project_normed,
    stream_activation_bytes,
)


@dataclass(frozen=True, kw_only=True)
class Hyper(MultiStreamConfigBase):
    """Several streams, mixed by learned weights that may depend on the token."""

    kind: Literal["hyper"] = "hyper"
    fracs: Size = 1
    dynamic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fracs < 1:
            raise ValueError(f"fracs={self.fracs} must be at least 1")

    def check(self, dim: int) -> None:
        """Every stream must fall into whole pieces."""
        if dim % self.fracs:
            raise ValueError(f"dim={dim} must be a multiple of fracs={self.fracs}")

    def build(self, build_ctx: BuildContext) -> "HyperResidual":
        """Build the module."""
        return HyperResidual(self, build_ctx)


class HyperResidual(Residual):
    """The module of `Hyper`."""

    ROLE: ClassVar[Literal["vector"]] = "vector"

    def __init__(self, config: Hyper, build_ctx: BuildContext):
        super().__init__()
        self.streams, self.fracs, self.eps = config.streams, config.fracs, build_ctx.norm_eps
        self.dynamic = config.dynamic
        self.pieces = self.streams * self.fracs
        self.width = build_ctx.dim // self.fracs
        self.static = nn.Parameter(self._start(build_ctx.sublayer_idx % self.streams))
        if self.dynamic:
            columns = self.static.shape[1]
            self.projection = nn.Parameter(torch.zeros(self.width, columns))
            self.scale = nn.Parameter(torch.full((2,), 0.01))

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """(B, T, n, D) -> what the sub-layer reads, and the mixed streams with the weights of
        what it will say.
        """
        with no_autocast(h.device):
            h_BTPD = h.to(at_least_fp32(h.dtype)).unflatten(-1, (self.fracs, -1)).flatten(2, 3)
            weights_BTPC = self._weights(h_BTPD)
            taken, back_BTPF = weights_BTPC.split([self.fracs + self.pieces, self.fracs], -1)
            x_BTFD, kept_BTPD = mix_streams(taken.mT, h_BTPD).split([self.fracs, self.pieces], 2)
        return x_BTFD.flatten(2).to(h.dtype), (kept_BTPD, back_BTPF)

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """The mixed streams plus what was said, (B, T, n, D)."""
        kept_BTPD, back_BTPF = saved
        with no_autocast(h.device):
            pairs = back_BTPF.unflatten(2, (self.streams, self.fracs))
            onto_BTPF = pairs.mT.flatten(2, 3)
            after_BTPD = add_to_streams(kept_BTPD, onto_BTPF, y.unflatten(-1, (self.fracs, -1)))
        return after_BTPD.view(h.shape).to(h.dtype)

    def flops(self) -> int:
        """Of the projection, which is of every piece alone, and the mixes."""
        made = self.static.shape[1] if self.dynamic else 0
        return mixing_flops(made, self.pieces, self.fracs, self.width)

    def activation_bytes(self) -> int:
        """The streams and what was said."""
        return stream_activation_bytes(self.pieces * self.width, self.fracs * self.width)

    def _weights(self, h_BTPD: Tensor) -> Tensor:
        """(B, T, P, C): for every piece its columns of A_m and of A_r, and its row of B."""
        kind = h_BTPD.dtype
        static_PC = self.static.to(kind)
        if not self.dynamic:
            return static_PC.expand(*h_BTPD.shape[:2], -1, -1)
        moved_BTPC = project_normed(h_BTPD, self.projection.to(kind), self.eps).tanh()
        mixing, writing = self.scale.to(kind)
        scale_C = torch.cat((mixing.expand(self.fracs + self.pieces), writing.expand(self.fracs)))
        return torch.addcmul(static_PC, moved_BTPC, scale_C)

    def _start(self, stream: int) -> Tensor:
        """(P, C) with which the sub-layer reads `stream`, every stream keeps what it has, and what
        is said is added to all.
        """
        same = torch.eye(self.fracs)
        into = torch.zeros(self.streams, self.fracs, self.fracs)
        into[stream] = same
        back = same.repeat(self.streams, 1)
        return torch.cat((into.flatten(0, 1), torch.eye(self.pieces), back), 1)
