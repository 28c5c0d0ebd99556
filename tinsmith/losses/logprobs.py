"""Token log-probabilities without ever holding (tokens x vocabulary), and what is made of them.

A cross-entropy knows its slope at once, so it is summed by `chunked.summed`. Of log-probabilities
that enter a further formula the upstream gradient is not known yet: `chosen_logprobs` computes the
head's product again, chunk by chunk.

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
"""How a KL divergence is estimated from sampled tokens; see `kl`."""
KLLossEstimator = Literal["k2", "k3"]
"""Those that may be a loss: the gradient of k1 is zero in expectation, so configs whose KL is part
of a loss take this type and refuse k1."""

MAX_LOG_RATIO = 20.0
"""The log-ratio at which a ratio of two probabilities stops: e^20 is 5e8. Float32 ends at e^88, and
what is infinite there is no number once it is multiplied by 0."""


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[id], (B, T) in at least float32, in nats; differentiable.

    `logits` (B, T, V), already shifted and divided by the temperature: position t is to predict
    `ids[:, t]`. `ids` (B, T).
    """
    high = logits.to(at_least_fp32(logits.dtype))
    return high.gather(-1, ids[..., None]).squeeze(-1) - high.logsumexp(-1)


def kl(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """Per token, an estimate of KL(policy || reference) from tokens that the policy sampled.

    Both (B, T), in nats, of the sampled tokens; so is the result. With d = logprobs - reference:
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL divergence", 2020). As
    values k1 and k3 are unbiased. As losses, over samples of the policy, E[grad k1] = 0,
    E[grad k2] = grad KL(policy || reference) and E[grad k3] = grad KL(reference || policy). Of k3,
    -d is at most `HIGHEST`, and has no gradient beyond.
    ValueError for another name.
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
    """Of every row the sum over its masked-in positions: (B, T), (B, T) -> (B,)."""
    return values.where(mask != 0, 0).sum(1)


def summed_nll(
    hidden_BTD: Tensor, targets_BT: Tensor, weights_BT: Tensor, head: nn.Linear
) -> Tensor:
    """sum over tokens of weight * -log softmax(head(hidden))[target], a scalar in at least float32,
    in nats.

    Tokens of weight 0 are left out before the head and get exactly zero gradient; none at all give
    0. `head` has no bias.
    """
    chosen = weights_BT != 0
    targets_N = targets_BT[chosen]
    total, _ = chunked_head_loss(
        hidden_BTD[chosen],
        head.weight,
        weights_BT[chosen],
        lambda logits, part: cross_entropy_with_grad(logits, targets_N[part]),
    )
    return total


def cross_entropy_with_grad(logits_nV: Tensor, targets_n: Tensor) -> TokenLosses:
    """-log softmax(logits)[target] of every token, in nats."""
    logprobs_nV = logits_nV.log_softmax(1)
    target = targets_n[:, None]
    nll_n = -logprobs_nV.gather(1, target)[:, 0]
    slope_nV = logprobs_nV.exp_()
    slope_nV.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=slope_nV.dtype))
    return TokenLosses(nll_n, slope_nV)


def target_logprobs(
    hidden_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, head: nn.Linear, temperature: float = 1.0
) -> Tensor:
    """log softmax(head(hidden) / temperature)[id], (B, T) in at least float32, in nats;
    differentiable.

    Positions where `mask_BT` is 0 are left out before the head: 0 there, and exactly zero gradient.
    `head` has no bias. Forward and backward hold one chunk of logits at once.
    """
    chosen = mask_BT != 0
    inputs = hidden_BTD[chosen], head.weight, ids_BT[chosen], temperature
    output = cast("Tensor", _ChosenLogprobs.apply(*inputs))  # pyright: ignore[reportUnknownMemberType]
    whole = torch.zeros(chosen.shape, dtype=output.dtype, device=output.device)
    return whole.masked_scatter(chosen, output)


@torch.no_grad()
def token_nll(hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
    """-log softmax(head(hidden))[target] of every token, (N,) in at least float32, in nats; no
    gradient.
    """
    parts = [
        nn.functional.cross_entropy(head(hidden_ND[part]), targets_N[part], reduction="none")
        for part in token_chunks(len(targets_N), head.weight.shape[0])
    ]
    return torch.cat(parts)


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
    ) -> Tensor:
        ctx.low, ctx.temperature = matmul_dtype(hidden_ND), temperature
        high = at_least_fp32(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.detach().to(ctx.low), weight_VD.detach().to(ctx.low)
            output_N = torch.empty(len(ids_N), dtype=high, device=hidden.device)
            for part in token_chunks(len(ids_N), len(weight)):
                logits = (hidden[part] @ weight.T).to(high) / temperature
                output_N[part] = token_logprobs(logits, ids_N[part])
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        return output_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.to(ctx.low), weight_VD.to(ctx.low)
            hidden_grad = torch.empty_like(hidden_ND)
            weight_grad = torch.zeros_like(weight_VD, dtype=at_least_fp32(weight_VD.dtype))
            for part in token_chunks(len(ids_N), len(weight)):
                scale = upstream[0][part, None] / ctx.temperature
                logits = (hidden[part] @ weight.T).to(scale.dtype) / ctx.temperature
                slope = logits.softmax(1).mul_(-scale)
                slope.scatter_add_(1, ids_N[part, None], scale)
                slope = slope.to(ctx.low)
                hidden_grad[part] = (slope @ weight).to(hidden_grad.dtype)
                add_product(weight_grad, slope.T, hidden[part])
        return hidden_grad, weight_grad.to(weight_VD.dtype), None, None
