"""Manifold-constrained Hyper-Connections, mHC (Xie et al., 2512.24880).

    x = H_pre X      X' = H_res X + H_post^T F(x)      X in R^{n x D}, n copies of the embedding
    H_pre = sigmoid(a_pre v W_pre + b_pre)      H_post = 2 sigmoid(a_post v W_post + b_post)
    H_res = Sinkhorn((a_res mat(v W_res) + b_res) / temperature)      v = RMSNorm(vec(X))

H_res is doubly stochastic: each stream becomes a weighted mean of all streams, and the mean over
streams is preserved. So depth neither makes the streams grow nor removes what they have in common.
The streams themselves are never normalised.

Initially a = 0.01, H_post = 1 except its dynamic term, H_res has 0.87 (n = 4) on the diagonal, and
H_pre sums to 1, most of it at stream (sub-layer mod n): if all streams were equal and all weights
symmetric, the streams would stay equal forever. The values of b are ours. The output is the mean of
the streams, which H_res preserves; DeepSeek-V4 learns the weights of that sum.

Legend: B rows, T tokens, D width, n streams.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tinsmith.core.parse import Size
from tinsmith.nn.contract import BuildContext, Residual
from tinsmith.nn.precision import at_least_fp32, no_autocast, use_custom_backward
from tinsmith.nn.residuals.streams import (
    MultiStreamConfigBase,
    add_to_streams,
    mix_streams,
    mixing_flops,
    project_normed,
    stream_activation_bytes,
)

INIT_READ_WEIGHT = 0.88
"""Initial weight of its own stream in the input of a sub-layer."""
INIT_DIAGONAL_LOGIT = 3.0
"""Initial difference between diagonal and off-diagonal logits of H_res."""
MIN_TEMPERATURE = 1e-6
"""Division of logits by a smaller temperature may overflow float32."""


@dataclass(frozen=True, kw_only=True)
class MHyper(MultiStreamConfigBase):
    """Several residual streams, mixed by doubly stochastic matrices that depend on the token."""

    kind: Literal["mhyper"] = "mhyper"
    sinkhorn_iterations: Size = 20
    sinkhorn_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations={self.sinkhorn_iterations} must be at least 1")
        if not self.sinkhorn_temperature >= MIN_TEMPERATURE:
            setting = f"sinkhorn_temperature={self.sinkhorn_temperature}"
            raise ValueError(f"{setting} must be at least {MIN_TEMPERATURE}")

    def build(self, build_ctx: BuildContext) -> "MHyperResidual":
        """Build the module."""
        return MHyperResidual(self, build_ctx)


class MHyperResidual(Residual):
    """The module of `MHyper`."""

    ROLE: ClassVar[Literal["vector"]] = "vector"

    def __init__(self, config: MHyper, build_ctx: BuildContext):
        super().__init__()
        self.streams, self.eps = config.streams, build_ctx.norm_eps
        self.iterations = config.sinkhorn_iterations
        self.temperature = config.sinkhorn_temperature
        self.sizes = [self.streams, self.streams, self.streams**2]
        width = self.streams * build_ctx.dim
        self.projection = nn.Parameter(torch.randn(width, sum(self.sizes)) * 0.5 / width**0.5)
        self.scale = nn.Parameter(torch.full((3,), 0.01))
        self.bias = nn.Parameter(self._initial_bias(build_ctx.sublayer_idx % self.streams))

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """Return H_pre X, and (H_res X, H_post)."""
        with no_autocast(h.device):
            h_BTnD = h.to(at_least_fp32(h.dtype))
            pre_BTn, post_BTn, res_BTnn = self._weights(h_BTnD)
            mixing = torch.cat((pre_BTn.unsqueeze(2), res_BTnn), 2)
            x_BT1D, mixed_BTnD = mix_streams(mixing, h_BTnD).split([1, self.streams], 2)
        return x_BT1D.squeeze(2).to(h.dtype), (mixed_BTnD, post_BTn.unsqueeze(-1))

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """Return H_res X + H_post^T y, (B, T, n, D)."""
        mixed_BTnD, post_BTn1 = saved
        with no_autocast(h.device):
            return add_to_streams(mixed_BTnD, post_BTn1, y.unsqueeze(2)).to(h.dtype)

    def flops(self) -> int:
        """Count the projection and the mixing products; Sinkhorn's sums are negligible."""
        return mixing_flops(sum(self.sizes), self.streams, 1, len(self.projection) // self.streams)

    def activation_bytes(self) -> int:
        """Count the streams and the sub-layer's output."""
        width = len(self.projection)
        return stream_activation_bytes(width, width // self.streams)

    def _weights(self, h_BTnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_pre (B, T, n), H_post (B, T, n), H_res (B, T, n, n)."""
        kind = h_BTnD.dtype
        dynamic = project_normed(h_BTnD.flatten(2), self.projection.to(kind), self.eps)
        scale = torch.cat([a.expand(size) for a, size in zip(self.scale, self.sizes, strict=True)])
        logits = torch.addcmul(self.bias.to(kind), dynamic, scale.to(kind))
        pre_BTn, post_BTn, res = logits.split(self.sizes, -1)
        res_BTnn = res.unflatten(-1, (self.streams, self.streams)) / self.temperature
        return pre_BTn.sigmoid(), 2 * post_BTn.sigmoid(), sinkhorn(res_BTnn, self.iterations)

    def _initial_bias(self, stream: int) -> Tensor:
        """Return the initial b_pre, b_post and b_res, concatenated."""
        pre = torch.full((self.streams,), _logit((1 - INIT_READ_WEIGHT) / (self.streams - 1)))
        pre[stream] = _logit(INIT_READ_WEIGHT)
        res = INIT_DIAGONAL_LOGIT * self.temperature * torch.eye(self.streams)
        return torch.cat((pre, torch.zeros(self.streams), res.flatten()))


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return exp(logits) (B, T, n, n) after `iterations` of Sinkhorn-Knopp (1967).

    An iteration divides all columns and then all rows by their sums. Rows sum to 1; columns sum to
    nearly 1, less nearly for matrices close to a permutation.

    The first iteration is computed in logarithms. After it every row and every column has an
    element of at least 1/n^2, and keeps one, so no sum vanishes for any logits.
    """
    # Tokens last: sums over n adjacent elements would take several times as long.
    logits_nnBT = logits.movedim((-2, -1), (0, 1)).contiguous()
    normalise = _Sinkhorn.apply if use_custom_backward() else _sinkhorn
    mix_nnBT: Tensor = normalise(logits_nnBT, iterations)  # type: ignore[assignment]
    return mix_nnBT.movedim((0, 1), (-2, -1))


def _sinkhorn(logits_nnBT: Tensor, iterations: int) -> Tensor:
    first_nnBT = logits_nnBT.log_softmax(0).softmax(1)
    steps = [(first_nnBT,), *_rounds(first_nnBT, iterations - 1)]
    return steps[-1][0]


def _rounds(mix_nnBT: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield every half iteration: the divided matrix, the sums, and their axis."""
    for _ in range(count):
        for axis in (0, 1):
            sums = mix_nnBT.sum(axis, keepdim=True)
            mix_nnBT = mix_nnBT / sums
            yield mix_nnBT, sums, axis


class _Sinkhorn(torch.autograd.Function):
    """Sinkhorn with a backward that repeats the iterations and saves nothing of them.

    The gradient of M = X / sum(X) is dX = (dM - sum(dM M)) / sum(X). It takes a third of autograd's
    time.
    """

    @staticmethod
    def forward(ctx: Any, logits_nnBT: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits_nnBT)
        ctx.rounds = iterations - 1
        return _sinkhorn(logits_nnBT, iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (logits_nnBT,) = ctx.saved_tensors
        columns_nnBT = logits_nnBT.softmax(0)
        first_nnBT = logits_nnBT.log_softmax(0).softmax(1)
        grad_nnBT = upstream[0].clone(memory_format=torch.contiguous_format)
        for mix_nnBT, sums, axis in reversed(list(_rounds(first_nnBT, ctx.rounds))):
            grad_nnBT.sub_((grad_nnBT * mix_nnBT).sum(axis, keepdim=True)).div_(sums)
        grad_nnBT.sub_((grad_nnBT * first_nnBT).sum(1, keepdim=True)).mul_(first_nnBT)
        return grad_nnBT.sub_(columns_nnBT * grad_nnBT.sum(0, keepdim=True)), None


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))
