"""What residuals of several streams share: their state (B, T, n, D), and the products on it.

A residual rounds the streams where they come in and go out, to their own type, and computes in
between in at least float32; so autocast, which would round operands, is off there.

Legend: B rows, T tokens, P pieces of the state, Q pieces made of them, F pieces of what a sub-layer
said, D width of a piece.
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
    """A residual state of several streams."""

    streams: Size = 4

    def __post_init__(self) -> None:
        if self.streams < 2:
            raise ValueError(f"streams={self.streams} must be at least 2; one stream is `plain`")

    def expand(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, n, D), n copies."""
        return x.unsqueeze(2).repeat(1, 1, self.streams, 1)

    def collapse(self, h: Tensor) -> Tensor:
        """(B, T, n, D) -> (B, T, D), the mean over the streams."""
        return h.mean(2)


def mixing_flops(num_projected: int, pieces: int, num_read: int, width: int) -> int:
    """Per token: `made` numbers of the whole state, and sums of `width` numbers, of the state's
    pieces (`heard` for the sub-layer, and all anew) and of what it says.
    """
    return 2 * num_projected * pieces * width + 2 * width * pieces * (num_read + pieces + num_read)


def stream_activation_bytes(state: int, dim: int) -> int:
    """Per token: the state, and what was said, in float32."""
    return 4 * (state + dim)


def project_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) W over the last axis, (..., D) and (D, K) to (..., K); the norm has no gain.

    A norm is a number per vector, so it can be taken after the product: the normed vectors are
    never written down.
    """
    project = _Project.apply if use_custom_backward() else _project
    output: tuple[Tensor, Tensor] = project(x, weight, eps)  # type: ignore[assignment]
    return output[0]


def _project(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """With the factor that norms, (..., 1)."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    shrink = (size.square() / x.shape[-1] + eps).rsqrt()
    return (x @ weight) * shrink, shrink


class _Project(torch.autograd.Function):
    """Its gradient in few passes over x: with y = r x W and r = 1 / sqrt(mean(x^2) + eps),
    dx = r dy W^T - x r^2 (dy . y) / D and dW = x^T r dy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, shrink = _project(x, weight, eps)
        ctx.save_for_backward(x, weight, y, shrink)
        ctx.mark_non_differentiable(shrink)
        return y, shrink

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y, shrink = ctx.saved_tensors
        along = (upstream[0] * y).sum(-1, keepdim=True).mul_(shrink.square()).div_(x.shape[-1])
        moved = upstream[0] * shrink
        dx = (moved @ weight.mT).addcmul_(x, along, value=-1)
        return dx, (moved.flatten(0, -2).mT @ x.flatten(0, -2)).mT, None


def mix_streams(weights_BTQP: Tensor, h_BTPD: Tensor) -> Tensor:
    """Q weighted sums of the P pieces of every token, (B, T, Q, D). A compiler fuses what is not
    called a product, and reads the pieces once for several such sums.
    """
    if torch.compiler.is_compiling():
        return (weights_BTQP.unsqueeze(-1) * h_BTPD.unsqueeze(-3)).sum(-2)
    # A batch of strided matrices is multiplied one by one.
    return weights_BTQP.contiguous() @ h_BTPD


def add_to_streams(mixed_BTQD: Tensor, weights_BTQF: Tensor, y_BTFD: Tensor) -> Tensor:
    """kept + weights y in one pass, (B, T, Q, D)."""
    left, right = weights_BTQF.flatten(0, 1), y_BTFD.to(mixed_BTQD.dtype).flatten(0, 1)
    return torch.baddbmm(mixed_BTQD.flatten(0, 1), left, right).view(mixed_BTQD.shape)
