"""RMSNorm and LayerNorm, with statistics in at least float32 for any input dtype."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinsmith.nn.precision import at_least_fp32, use_custom_backward


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang & Sennrich, 1910.07467).

    The square is taken after the cast, so large fp16 inputs do not overflow.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., dim); the dtype stays the same."""
        norm = _Normalise.apply if use_custom_backward() else _normalise
        return norm(x, self.weight, self.eps)  # type: ignore[no-any-return]


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = at_least_fp32(x.dtype)
    return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)


class _Normalise(torch.autograd.Function):
    """RMSNorm with a backward in few passes over memory: torch has no fused CPU kernel for it.

    dx = r (u - x r^2 mean(u x)) with u = weight * dy and r = 1 / sqrt(mean(x^2) + eps); dweight =
    sum of dy x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = at_least_fp32(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        factor = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, factor)
        return (x * factor).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        (dy,) = upstream
        dtype, width = factor.dtype, x.shape[-1]
        normed = (x * factor).to(dtype)
        weighted = dy * normed
        dweight = weighted.reshape(-1, width).sum(0) if ctx.needs_input_grad[1] else None
        radial = (weighted @ weight.to(dtype)).unsqueeze(-1) / width
        dx = torch.addcmul(dy * weight, normed, radial, value=-1).mul_(factor)
        return dx.to(x.dtype), None if dweight is None else dweight.to(weight.dtype), None


class LayerNorm(nn.Module):
    """y = weight * (x - mean) / sqrt(variance + eps) + bias over the last axis (Ba et al.,
    1607.06450).
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., dim); the dtype stays the same."""
        dtype = at_least_fp32(x.dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.weight.shape, weight, bias, self.eps).to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
