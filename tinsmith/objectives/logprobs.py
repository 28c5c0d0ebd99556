"""Token log-probabilities without ever holding (tokens x vocabulary), and what is made of them.

Softmax and its gradient are formed chunk by chunk in at least float32; products with the head run
in the precision of the surrounding autocast. The backward pass of a cross-entropy needs nothing
that its forward pass has not just had in hand, so both are done there (as in Liger, 2410.10989),
and the head's product is never computed twice. Of log-probabilities that enter a further formula
the upstream gradient is not known yet: `chosen_logprobs` computes the product again, chunk by
chunk.

Legend: B rows, T tokens in a row, N tokens, D width, V vocabulary.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinsmith.nn.parts.norm import wide

ELEMENTS = 2**21
"""Logits held at once."""

Estimator = Literal["k1", "k2", "k3"]
"""How a KL divergence is estimated from sampled tokens; see `kl`."""
LossEstimator = Literal["k2", "k3"]
"""Those that may be a loss: the gradient of k1 is zero in expectation, so configs whose KL is part
of a loss take this type and refuse k1."""


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[id], (B, T) in at least float32, in nats; differentiable.

    `logits` (B, T, V), already shifted and divided by the temperature: position t is to predict
    `ids[:, t]`. `ids` (B, T).
    """
    high = logits.to(wide(logits.dtype))
    return high.gather(-1, ids[..., None]).squeeze(-1) - high.logsumexp(-1)


def kl(logprobs: Tensor, reference_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Per token, an estimate of KL(policy || reference) from tokens that the policy sampled.

    Both (B, T), in nats, of the sampled tokens; so is the result. With d = logprobs - reference:
    k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (Schulman, "Approximating KL divergence", 2020). As
    values k1 and k3 are unbiased. As losses, over samples of the policy, E[grad k1] = 0,
    E[grad k2] = grad KL(policy || reference) and E[grad k3] = grad KL(reference || policy).
    ValueError for another name.
    """
    difference = logprobs - reference_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
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
    return _SummedNLL.apply(hidden_BTD[chosen], head.weight, targets_BT[chosen], weights_BT[chosen])  # type: ignore[no-any-return]


def chosen_logprobs(
    hidden_BTD: Tensor, ids_BT: Tensor, mask_BT: Tensor, head: nn.Linear, temperature: float = 1.0
) -> Tensor:
    """log softmax(head(hidden) / temperature)[id], (B, T) in at least float32, in nats;
    differentiable.

    Positions where `mask_BT` is 0 are left out before the head: 0 there, and exactly zero gradient.
    `head` has no bias. Forward and backward hold `ELEMENTS` logits at once.
    """
    chosen = mask_BT != 0
    said = _ChosenLogprobs.apply(hidden_BTD[chosen], head.weight, ids_BT[chosen], temperature)
    whole = torch.zeros(chosen.shape, dtype=said.dtype, device=said.device)  # type: ignore[union-attr]
    return whole.masked_scatter(chosen, said)  # type: ignore[arg-type]


@torch.no_grad()
def token_nll(hidden_ND: Tensor, targets_N: Tensor, head: nn.Linear) -> Tensor:
    """-log softmax(head(hidden))[target] of every token, (N,) in at least float32, in nats; no
    gradient.
    """
    parts = [
        nn.functional.cross_entropy(head(hidden_ND[part]), targets_N[part], reduction="none")
        for part in _chunks(len(targets_N), head.weight.shape[0])
    ]
    return torch.cat(parts) if parts else hidden_ND.new_zeros(0, dtype=wide(hidden_ND.dtype))


class _SummedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weights_N: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        low = _product_dtype(hidden_ND)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            total, grads = _forward(hidden_ND, weight_VD, targets_N, weights_N, low, wanted)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        hidden_grad, weight_grad = (
            None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, weight_grad, None, None


def _forward(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    low: torch.dtype,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """The sum, and the gradients of hidden states and head, as far as they are `wanted`: a frozen
    head (LoRA) costs none.
    """
    high = wide(hidden_ND.dtype)
    hidden, weight = hidden_ND.detach().to(low), weight_VD.detach().to(low)
    total = torch.zeros((), dtype=high, device=hidden.device)
    hidden_grad = torch.empty_like(hidden_ND) if wanted[0] else None
    weight_grad = torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype)) if wanted[1] else None
    for part in _chunks(len(targets_N), len(weight)):
        logprobs = (hidden[part] @ weight.T).log_softmax(1, dtype=high)
        target, scale = targets_N[part, None], weights_N[part, None].to(high)
        total -= (logprobs.gather(1, target) * scale).sum()
        if not any(wanted):
            continue
        slope = logprobs.exp_()
        slope.scatter_add_(1, target, torch.full_like(scale, -1.0))
        slope = slope.mul_(scale).to(low)
        if hidden_grad is not None:
            hidden_grad[part] = (slope @ weight).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad += slope.T @ hidden[part]
    return total, (hidden_grad, None if weight_grad is None else weight_grad.to(weight_VD.dtype))


class _ChosenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, ids_N: Tensor, temperature: float
    ) -> Tensor:
        ctx.low, ctx.temperature = _product_dtype(hidden_ND), temperature
        high = wide(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.detach().to(ctx.low), weight_VD.detach().to(ctx.low)
            said_N = torch.empty(len(ids_N), dtype=high, device=hidden.device)
            for part in _chunks(len(ids_N), len(weight)):
                logits = (hidden[part] @ weight.T).to(high) / temperature
                said_N[part] = token_logprobs(logits, ids_N[part])
        ctx.save_for_backward(hidden_ND, weight_VD, ids_N)
        return said_N

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, ids_N = ctx.saved_tensors
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.to(ctx.low), weight_VD.to(ctx.low)
            hidden_grad = torch.empty_like(hidden_ND)
            weight_grad = torch.zeros_like(weight_VD, dtype=wide(weight_VD.dtype))
            for part in _chunks(len(ids_N), len(weight)):
                scale = upstream[0][part, None] / ctx.temperature
                logits = (hidden[part] @ weight.T).to(scale.dtype) / ctx.temperature
                slope = logits.softmax(1).mul_(-scale)
                slope.scatter_add_(1, ids_N[part, None], scale)
                slope = slope.to(ctx.low)
                hidden_grad[part] = (slope @ weight).to(hidden_grad.dtype)
                weight_grad += slope.T @ hidden[part]
        return hidden_grad, weight_grad.to(weight_VD.dtype), None, None


def _product_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The precision of the surrounding autocast, for products with the head."""
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
