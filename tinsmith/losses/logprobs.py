"""Token log-probabilities and cross-entropy without storing all logits (tokens x vocabulary).

A cross-entropy knows its gradient at once, so `losses.chunked_head` sums it. For log-probabilities
that enter another formula the upstream gradient is not known in the forward pass: `target_logprobs`
computes the head's product again in the backward pass, chunk by chunk.

Legend: B rows, T tokens in a row, N tokens, n tokens of a chunk, D width, V vocabulary.
"""

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tinsmith.losses.chunked_head import (
    TokenLosses,
    add_product,
    chunked_head_loss,
    matmul_dtype,
    token_chunks,
)
from tinsmith.nn.precision import at_least_fp32

KLEstimator = Literal["k1", "k2", "k3"]
"""Estimator of a KL divergence from sampled tokens; see `kl`."""
KLLossEstimator = Literal["k2", "k3"]
"""Estimators that may be a loss: the gradient of k1 is zero in expectation, so configs whose KL is
part of a loss have this type and refuse k1."""

MAX_LOG_RATIO = 20.0
"""Upper bound of log-ratios of probabilities: e^20 is 5e8. Float32 overflows at e^88, and infinity
times 0 is NaN."""


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log softmax(logits)[id], (B, T) in at least float32, in nats; differentiable.

    `logits` (B, T, V) are already shifted and divided by the temperature: position t predicts
    `ids[:, t]`. `ids` (B, T).
    """
    high = logits.to(at_least_fp32(logits.dtype))
    return high.gather(-1, ids[..., None]).squeeze(-1) - high.logsumexp(-1)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) per token, from tokens sampled by the policy.

    Both inputs are (B, T), in nats, of the sampled tokens; so is the result. With d = logprobs -
    reference: k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL divergence",
    2020). As values, k1 and k3 are unbiased. As losses, over samples of the policy, E[grad k1] = 0,
    E[grad k2] = grad KL(policy || reference) and E[grad k3] = grad KL(reference || policy). In k3,
    -d is clipped to `MAX_LOG_RATIO`, and has no gradient beyond. ValueError for another estimator.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        difference = difference.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-difference) + difference
    raise ValueError(f"estimator={estimator} must be k1, k2 or k3")


def row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of every row over positions with mask 1: (B, T), (B, T) -> (B,)."""
    return values.where(mask != 0, 0).sum(1)


def summed_nll(
    hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor, head: nn.Linear
) -> Tensor:
    """sum over tokens of weight * -log softmax(head(hidden))[target], a scalar in at least float32,
    in nats.

    Tokens of weight 0 are left out before the head and get exactly zero gradient; none at all give
    0. `head` has no bias.
    """
    selected = weights_BT != 0
    targets_N = targets_BT[selected]
    total, _ = chunked_head_loss(
        hidden_BTD[selected],
        head.weight,
        weights_BT[selected],
        lambda logits, part: cross_entropy_with_grad(logits, targets_N[part]),
    )
    return total


def cross_entropy_with_grad(logits_nV: Tensor, targets_n: Tensor) -> TokenLosses:
    """Return -log softmax(logits)[target] of every token, in nats, and its gradient."""
    logprobs_nV = logits_nV.log_softmax(1)
    target = targets_n[:, None]
    nll_n = -logprobs_nV.gather(1, target)[:, 0]
    grad_nV = logprobs_nV.exp_()
    grad_nV.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=grad_nV.dtype))
    return TokenLosses(nll_n, grad_nV)


def target_logprobs(
    hidden_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, head: nn.Linear, temperature: float = 1.0
) -> Tensor:
    """Return log softmax(head(hidden) / temperature)[id], (B, T) in at least float32, in nats.

    Differentiable. Positions where `mask_BT` is 0 skip the head: they are 0 and have exactly zero
    gradient. `head` has no bias. Forward and backward store one chunk of logits at once.
    """
    selected = mask_BT != 0
    inputs = hidden_BTD[selected], head.weight, ids_BT[selected], temperature
    logprobs = cast("Tensor", _ChunkedLogprobs.apply(*inputs))  # pyright: ignore[reportUnknownMemberType]
    zeros = torch.zeros(selected.shape, dtype=logprobs.dtype, device=logprobs.device)
    return zeros.masked_scatter(selected, logprobs)


@torch.no_grad()
def token_nll(hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
    """Return -log softmax(head(hidden))[target], (N,) in at least float32, in nats; no gradient."""
    chunks = [
        nn.functional.cross_entropy(head(hidden_ND[chunk]), targets_N[chunk], reduction="none")
        for chunk in token_chunks(len(targets_N), head.weight.shape[0])
    ]
    return torch.cat(chunks)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
    ) -> Tensor:
        ctx.low, ctx.temperature = matmul_dtype(hidden_ND), temperature
        dtype = at_least_fp32(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.detach().to(ctx.low), weight_VD.detach().to(ctx.low)
            logprobs_N = torch.empty(len(ids_N), dtype=dtype, device=hidden.device)
            for chunk in token_chunks(len(ids_N), len(weight)):
                logits = (hidden[chunk] @ weight.T).to(dtype) / temperature
                logprobs_N[chunk] = token_logprobs(logits, ids_N[chunk])
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        return logprobs_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.to(ctx.low), weight_VD.to(ctx.low)
            hidden_grad = torch.empty_like(hidden_ND)
            weight_grad = torch.zeros_like(weight_VD, dtype=at_least_fp32(weight_VD.dtype))
            for chunk in token_chunks(len(ids_N), len(weight)):
                scale = upstream[0][chunk, None] / ctx.temperature
                logits = (hidden[chunk] @ weight.T).to(scale.dtype) / ctx.temperature
                logit_grad = logits.softmax(1).mul_(-scale)
                logit_grad.scatter_add_(1, ids_N[chunk, None], scale)
                logit_grad = logit_grad.to(ctx.low)
                hidden_grad[chunk] = (logit_grad @ weight).to(hidden_grad.dtype)
                add_product(weight_grad, logit_grad.T, hidden[chunk])
        return hidden_grad, weight_grad.to(weight_VD.dtype), None, None
