"""Hyper-Connections (Zhu et al., 2409.19606), with frac-connections (Zhu et al., 2503.14125).

    x = A_m^T H      H' = A_r^T H + B^T F(x)      H in R^{n x D}, n copies of the embedding at first
    [A_m | A_r] = s_a tanh(N W) + static,  B = s_b tanh(N W) + static,  N = RMSNorm(H) per stream

`dynamic: false` keeps only the static terms. With `fracs: m` every stream is cut into m pieces of D
/ m elements; A_m mixes the P = n m pieces into the m pieces of x, A_r mixes them into each other,
and B adds every piece of F(x) to the pieces of every stream. Initially W = 0, s = 0.01, A_r = I, B
adds the output to every stream, and A_m reads stream (sub-layer mod n): exactly the pre-norm
residual.

Differs from the papers: the norm has no gain (W can learn it); the output is the mean of the
streams, not their sum, which the final norm ignores except for its epsilon; B may add a piece of
F(x) to another piece of a stream (2503.14125 keeps them separate, as B does here initially);
fractions of a single stream (its n = 1) are not supported.

Legend: B rows, T tokens, D width, n streams, P pieces of the state, F fracs, C = F + P + F mixing
weights per piece.
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
    """Several residual streams, mixed by learned weights that may depend on the token."""

    kind: Literal["hyper"] = "hyper"
    fracs: Size = 1
    dynamic: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fracs < 1:
            raise ValueError(f"fracs={self.fracs} must be at least 1")

    def check(self, dim: int) -> None:
        """Raise ValueError if a stream cannot be cut into equal pieces."""
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
        self.static = nn.Parameter(self._initial_static(build_ctx.sublayer_idx % self.streams))
        if self.dynamic:
            columns = self.static.shape[1]
            self.projection = nn.Parameter(torch.zeros(self.width, columns))
            self.scale = nn.Parameter(torch.full((2,), 0.01))

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """Return the input of the sub-layer, and (mixed streams, weights of the sub-layer's
        output).
        """
        with no_autocast(h.device):
            h_BTPD = h.to(at_least_fp32(h.dtype)).unflatten(-1, (self.fracs, -1)).flatten(2, 3)
            weights_BTPC = self._weights(h_BTPD)
            mixing, write_BTPF = weights_BTPC.split([self.fracs + self.pieces, self.fracs], -1)
            x_BTFD, mixed_BTPD = mix_streams(mixing.mT, h_BTPD).split([self.fracs, self.pieces], 2)
        return x_BTFD.flatten(2).to(h.dtype), (mixed_BTPD, write_BTPF)

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """Add the sub-layer's output to the mixed streams, (B, T, n, D)."""
        mixed_BTPD, write_BTPF = saved
        with no_autocast(h.device):
            pairs = write_BTPF.unflatten(2, (self.streams, self.fracs))
            transposed_BTPF = pairs.mT.flatten(2, 3)
            h_BTPD = add_to_streams(mixed_BTPD, transposed_BTPF, y.unflatten(-1, (self.fracs, -1)))
        return h_BTPD.view(h.shape).to(h.dtype)

    def flops(self) -> int:
        """Count the projection of every piece and the mixing products."""
        num_projected = self.static.shape[1] if self.dynamic else 0
        return mixing_flops(num_projected, self.pieces, self.fracs, self.width)

    def activation_bytes(self) -> int:
        """Count the streams and the sub-layer's output."""
        return stream_activation_bytes(self.pieces * self.width, self.fracs * self.width)

    def _weights(self, h_BTPD: Tensor) -> Tensor:
        """Return (B, T, P, C): for every piece its columns of A_m and A_r and its row of B."""
        kind = h_BTPD.dtype
        static_PC = self.static.to(kind)
        if not self.dynamic:
            return static_PC.expand(*h_BTPD.shape[:2], -1, -1)
        dynamic_BTPC = project_normed(h_BTPD, self.projection.to(kind), self.eps).tanh()
        mix_scale, write_scale = self.scale.to(kind)
        scale_C = torch.cat(
            (mix_scale.expand(self.fracs + self.pieces), write_scale.expand(self.fracs))
        )
        return torch.addcmul(static_PC, dynamic_BTPC, scale_C)

    def _initial_static(self, stream: int) -> Tensor:
        """Return (P, C) of the pre-norm residual: read `stream`, keep all streams, write to all."""
        identity = torch.eye(self.fracs)
        read = torch.zeros(self.streams, self.fracs, self.fracs)
        read[stream] = identity
        write = identity.repeat(self.streams, 1)
        return torch.cat((read.flatten(0, 1), torch.eye(self.pieces), write), 1)
