"""Base classes and products for residuals of several streams, whose state is (B, T, n, D).

Streams are stored in their own dtype and mixed in at least float32. Autocast is off, because it
would round the operands.

Legend: B rows, T tokens, P pieces of the state, Q pieces after mixing, F pieces of a sub-layer's
output, D width of a piece.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tinsmith.core.parse import Size
from tinsmith.nn.contract import ResidualConfigBase
from tinsmith.nn.precision import use_custom_backward


@dataclass(frozen=True, kw_only=True)
class MultiStreamConfigBase(ResidualConfigBase):
    """Base of residual configs with several streams."""

    streams: Size = 4

    def __post_init__(self) -> None:
        if self.streams < 2:
            raise ValueError(f"streams={self.streams} must be at least 2; one stream is `plain`")

    def expand(self, x: Tensor) -> Tensor:
        """Copy (B, T, D) n times to (B, T, n, D)."""
        return x.unsqueeze(2).repeat(1, 1, self.streams, 1)

    def collapse(self, h: Tensor) -> Tensor:
        """Return the mean over the streams, (B, T, n, D) to (B, T, D)."""
        return h.mean(2)


def mixing_flops(num_projected: int, pieces: int, num_read: int, width: int) -> int:
    """Count FLOPs per token of a residual with `pieces` pieces of `width` elements.

    Every piece is projected to `num_projected` mixing weights. The sub-layer's input has `num_read`
    pieces, which are sums over all pieces; all pieces are mixed into new ones; the output's
    `num_read` pieces are added to them.
    """
    return 2 * num_projected * pieces * width + 2 * width * pieces * (num_read + pieces + num_read)


def stream_activation_bytes(state: int, dim: int) -> int:
    """Count the bytes per token of the state and of the sub-layer's output, in float32."""
    return 4 * (state + dim)


def project_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return RMSNorm(x) W over the last axis, (..., D) and (D, K) to (..., K); the norm has no
    gain.

    The norm is a scalar per vector, so it is applied after the product: the normalised vectors are
    never stored.
    """
    project = _Project.apply if use_custom_backward() else _project
    result: tuple[Tensor, Tensor] = project(x, weight, eps)  # type: ignore[assignment]
    return result[0]


def _project(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the product and the factor of the norm, (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    factor = (norm.square() / x.shape[-1] + eps).rsqrt()
    return (x @ weight) * factor, factor


class _Project(torch.autograd.Function):
    """`_project` with a gradient in few passes over x.

    With y = r x W and r = 1 / sqrt(mean(x^2) + eps): dx = r dy W^T - x r^2 (dy . y) / D and dW =
    x^T r dy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, factor = _project(x, weight, eps)
        ctx.save_for_backward(x, weight, y, factor)
        ctx.mark_non_differentiable(factor)
        return y, factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, factor = ctx.saved_tensors
        radial = (upstream[0] * y).sum(-1, keepdim=True).mul_(factor.square()).div_(x.shape[-1])
        scaled = upstream[0] * factor
        dx = (scaled @ weight.mT).addcmul_(x, radial, value=-1)
        return dx, (scaled.flatten(0, -2).mT @ x.flatten(0, -2)).mT, None


def mix_streams(weights_BTQP: Tensor, h_BTPD: Tensor) -> Tensor:
    """Return Q weighted sums of the P pieces of every token, (B, T, Q, D).

    A compiler fuses elementwise code but not a matrix product, so it reads the pieces once for
    several such sums.
    """
    if torch.compiler.is_compiling():
        return (weights_BTQP.unsqueeze(-1) * h_BTPD.unsqueeze(-3)).sum(-2)
    # torch multiplies a batch of strided matrices one by one.
    return weights_BTQP.contiguous() @ h_BTPD


def add_to_streams(mixed_BTQD: Tensor, weights_BTQF: Tensor, y_BTFD: Tensor) -> Tensor:
    """Return mixed + weights y in one pass, (B, T, Q, D)."""
    left, right = weights_BTQF.flatten(0, 1), y_BTFD.to(mixed_BTQD.dtype).flatten(0, 1)
    return torch.baddbmm(mixed_BTQD.flatten(0, 1), left, right).view(mixed_BTQD.shape)
