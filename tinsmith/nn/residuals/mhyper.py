"""Manifold-constrained Hyper-Connections, mHC (Xie et al., 2512.24880).

    x = H_pre X      X' = H_res X + H_post^T F(x)      X in R^{n x D}, n copies of the embedding
    H_pre = sigmoid(a_pre v W_pre + b_pre)      H_post = 2 sigmoid(a_post v W_post + b_post)
    H_res = Sinkhorn((a_res mat(v W_res) + b_res) / temperature)      v = RMSNorm(vec(X))

H_res is doubly stochastic: each stream becomes a weighted mean of all, and the mean of all stays;
so no depth of such mixes makes the streams grow, or loses what they share. They are never
normalised themselves.

At first a = 0.01, H_post = 1 but for its dynamic term, H_res is 0.87 (n = 4) on the diagonal, and
H_pre sums to 1, most of it at stream (sub-layer mod n): with all streams alike and all weights
symmetric they would stay alike for ever. The values of b are ours. At the end the mean of the
streams is taken, which H_res keeps; DeepSeek-V4 learns the weights of that sum.

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
"""The share of its first stream in what a sub-layer reads at first."""
INIT_DIAGONAL_LOGIT = 3.0
"""How much larger the logit on the diagonal of H_res is at first than those beside it."""
MIN_TEMPERATURE = 1e-6
"""Logits over a smaller temperature may be beyond float32."""


@dataclass(frozen=True, kw_only=True)
class MHyper(MultiStreamConfigBase):
    """Several streams, mixed by doubly stochastic matrices that depend on the token."""

    kind: Literal["mhyper"] = "mhyper"
    sinkhorn_iterations: Size = 20
    sinkhorn_temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations={self.sinkhorn_iterations} must be at least 1")
        if not self.sinkhorn_temperature >= MIN_TEMPERATURE:
            given = f"sinkhorn_temperature={self.sinkhorn_temperature}"
            raise ValueError(f"{given} must be at least {MIN_TEMPERATURE}")

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
        self.bias = nn.Parameter(self._start(build_ctx.sublayer_idx % self.streams))

    def read(self, h: Tensor) -> tuple[Tensor, Any]:
        """(B, T, n, D) -> H_pre X, and H_res X with H_post."""
        with no_autocast(h.device):
            h_BTnD = h.to(at_least_fp32(h.dtype))
            pre_BTn, post_BTn, res_BTnn = self._weights(h_BTnD)
            taken = torch.cat((pre_BTn.unsqueeze(2), res_BTnn), 2)
            x_BT1D, kept_BTnD = mix_streams(taken, h_BTnD).split([1, self.streams], 2)
        return x_BT1D.squeeze(2).to(h.dtype), (kept_BTnD, post_BTn.unsqueeze(-1))

    def write(self, h: Tensor, y: Tensor, saved: Any) -> Tensor:
        """H_res X + H_post^T y, (B, T, n, D)."""
        kept_BTnD, post_BTn1 = saved
        with no_autocast(h.device):
            return add_to_streams(kept_BTnD, post_BTn1, y.unsqueeze(2)).to(h.dtype)

    def flops(self) -> int:
        """Of the projection and the mixes; Sinkhorn's sums are few."""
        return mixing_flops(sum(self.sizes), self.streams, 1, len(self.projection) // self.streams)

    def activation_bytes(self) -> int:
        """The streams and what was said."""
        width = len(self.projection)
        return stream_activation_bytes(width, width // self.streams)

    def _weights(self, h_BTnD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """H_pre (B, T, n), H_post (B, T, n), H_res (B, T, n, n)."""
        kind = h_BTnD.dtype
        moved = project_normed(h_BTnD.flatten(2), self.projection.to(kind), self.eps)
        scale = torch.cat([a.expand(size) for a, size in zip(self.scale, self.sizes, strict=True)])
        logits = torch.addcmul(self.bias.to(kind), moved, scale.to(kind))
        pre_BTn, post_BTn, res = logits.split(self.sizes, -1)
        res_BTnn = res.unflatten(-1, (self.streams, self.streams)) / self.temperature
        return pre_BTn.sigmoid(), 2 * post_BTn.sigmoid(), sinkhorn(res_BTnn, self.iterations)

    def _start(self, stream: int) -> Tensor:
        """The first b_pre, b_post and b_res, one after the other."""
        pre = torch.full((self.streams,), _logit((1 - INIT_READ_WEIGHT) / (self.streams - 1)))
        pre[stream] = _logit(INIT_READ_WEIGHT)
        res = INIT_DIAGONAL_LOGIT * self.temperature * torch.eye(self.streams)
        return torch.cat((pre, torch.zeros(self.streams), res.flatten()))


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """exp(logits) (B, T, n, n), then `iterations` times all columns and then all rows divided by
    their sums (Sinkhorn and Knopp, 1967). Rows sum to 1; columns nearly, and the less nearly the
    closer the matrix comes to a permutation.

    The first round is taken in logarithms. After it every row and every column has an entry of at
    least 1/n^2, and goes on having one, so that no sum vanishes whatever the logits were.
    """
    # Tokens last: sums over n numbers that lie side by side would take several times as long.
    logits_nnBT = logits.movedim((-2, -1), (0, 1)).contiguous()
    balance = _Balance.apply if use_custom_backward() else _balance
    mix_nnBT: Tensor = balance(logits_nnBT, iterations)  # type: ignore[assignment]
    return mix_nnBT.movedim((0, 1), (-2, -1))


def _balance(logits_nnBT: Tensor, iterations: int) -> Tensor:
    first_nnBT = logits_nnBT.log_softmax(0).softmax(1)
    halves = [(first_nnBT,), *_rounds(first_nnBT, iterations - 1)]
    return halves[-1][0]


def _rounds(mix_nnBT: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Every half of every round: the divided matrix, by which sums, over which axis."""
    for _ in range(count):
        for axis in (0, 1):
            sums = mix_nnBT.sum(axis, keepdim=True)
            mix_nnBT = mix_nnBT / sums
            yield mix_nnBT, sums, axis


class _Balance(torch.autograd.Function):
    """The rounds are made once more for the gradient, which of M = X / sum(X) is
    dX = (dM - sum(dM M)) / sum(X): a third of what autograd does, and nothing is kept of a round.
    """

    @staticmethod
    def forward(ctx: Any, logits_nnBT: Tensor, iterations: int) -> Tensor:
        ctx.save_for_backward(logits_nnBT)
        ctx.rounds = iterations - 1
        return _balance(logits_nnBT, iterations)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (logits_nnBT,) = ctx.saved_tensors
        columns_nnBT = logits_nnBT.softmax(0)
        first_nnBT = logits_nnBT.log_softmax(0).softmax(1)
        slope_nnBT = upstream[0].clone(memory_format=torch.contiguous_format)
        for mix_nnBT, sums, axis in reversed(list(_rounds(first_nnBT, ctx.rounds))):
            slope_nnBT.sub_((slope_nnBT * mix_nnBT).sum(axis, keepdim=True)).div_(sums)
        slope_nnBT.sub_((slope_nnBT * first_nnBT).sum(1, keepdim=True)).mul_(first_nnBT)
        return slope_nnBT.sub_(columns_nnBT * slope_nnBT.sum(0, keepdim=True)), None


def _logit(share: float) -> float:
    return math.log(share / (1 - share))
