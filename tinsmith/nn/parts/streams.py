"""What residuals of several streams share: their state (B, T, n, D), and the products on it.

A residual rounds the streams where they come in and go out, to their own type, and computes in
between in at least float32; so autocast, which would round operands, is off there.

Legend: B rows, T tokens, P pieces of the state, Q pieces made of them, F pieces of what a sub-layer
said, D width of a piece.
"""

import torch
from torch import Tensor


def expand(x_BTD: Tensor, streams: int) -> Tensor:
    """(B, T, D) -> (B, T, n, D), n copies."""
    return x_BTD.unsqueeze(2).repeat(1, 1, streams, 1)


def collapse(h_BTnD: Tensor) -> Tensor:
    """(B, T, n, D) -> (B, T, D), the mean over the streams."""
    return h_BTnD.mean(2)


def project_normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm(x) W over the last axis, (..., D) and (D, K) to (..., K); the norm has no gain.

    A norm is a number per vector, so it can be taken after the product: the normed vectors are
    never written down.
    """
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    shrink = (size.square() / x.shape[-1] + eps).rsqrt()
    return (x @ weight) * shrink


def mix(weights_BTQP: Tensor, h_BTPD: Tensor) -> Tensor:
    """Q weighted sums of the P pieces of every token, (B, T, Q, D)."""
    return weights_BTQP @ h_BTPD


def add(kept_BTQD: Tensor, weights_BTQF: Tensor, y_BTFD: Tensor) -> Tensor:
    """kept + weights y in one pass, (B, T, Q, D)."""
    left, right = weights_BTQF.flatten(0, 1), y_BTFD.to(kept_BTQD.dtype).flatten(0, 1)
    return torch.baddbmm(kept_BTQD.flatten(0, 1), left, right).view(kept_BTQD.shape)
