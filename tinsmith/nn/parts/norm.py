"""Norms, with statistics in at least float32 whatever the input."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def wide(dtype: torch.dtype) -> torch.dtype:
    """At least float32: bf16 and fp16 rise, float64 stays."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang & Sennrich, 1910.07467).

    The square is taken after the cast, so large fp16 inputs do not overflow.
    """

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim), same dtype."""
        kind = wide(x.dtype)
        return F.rms_norm(x.to(kind), self.weight.shape, self.weight.to(kind), self.eps).to(x.dtype)


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
        """(..., dim) -> (..., dim), same dtype."""
        kind = wide(x.dtype)
        weight, bias = self.weight.to(kind), self.bias.to(kind)
        return F.layer_norm(x.to(kind), self.weight.shape, weight, bias, self.eps).to(x.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
