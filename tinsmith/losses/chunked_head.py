"""A sum of losses of logits, without ever holding (tokens x vocabulary).

A loss that is formed from one token's logits at a time tells with its value its slope, d loss / d
logits, so the gradients of hidden states and head are formed chunk by chunk in the forward pass (as
in Liger, 2410.10989): nothing of (tokens x vocabulary) waits for the backward pass, and the head's
product is never computed twice. Losses and slopes are in at least float32, products with the head
in the precision of the surrounding autocast.

Legend: N tokens, n tokens of a chunk, D width, V vocabulary, K kinds of observations.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.precision import at_least_fp32

MAX_CHUNK_LOGITS = 2**21
"""Logits held at once."""
MIN_CHUNK_TOKENS = 64
"""A chunk has at least so many: the gradient of a head is read and written once per chunk."""


class TokenLosses(NamedTuple):
    """What a loss says of n tokens."""

    loss_n: Tensor
    grad_nV: Tensor
    """d loss / d logits; the caller may overwrite it."""
    extras: tuple[Tensor, ...] = ()
    """More about each token (n,), to be looked at only."""


TokenLossFn = Callable[[Tensor, slice], TokenLosses]
"""Logits (n, V) in at least float32, and which of the N tokens they belong to."""


def chunked_head_loss(
    hidden_ND: Tensor, weight_VD: Tensor, weights_N: Tensor, loss_fn: TokenLossFn
) -> tuple[Tensor, Tensor]:
    """sum over tokens of weight * measure(hidden @ weight.T), a scalar in at least float32, and the
    same sums of all that the measure has seen, (K,), without gradient. No tokens at all give 0.
    """
    return _Summed.apply(hidden_ND, weight_VD, weights_N, loss_fn)  # type: ignore[return-value]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, weights_N: Tensor, measure: TokenLossFn
    ) -> tuple[Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]  # a frozen head costs no gradient
        low, high = matmul_dtype(hidden_ND), at_least_fp32(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.detach().to(low), weight_VD.detach().to(low)
            hidden_grad = torch.empty_like(hidden_ND) if wants_hidden else None
            kind = at_least_fp32(weight_VD.dtype)
            weight_grad = torch.zeros_like(weight_VD, dtype=kind) if wants_weight else None
            sums = torch.zeros((), dtype=high, device=hidden.device)
            for part in token_chunks(len(hidden), len(weight)):
                output = measure((hidden[part] @ weight.T).to(high), part)
                scale_n = weights_N[part].to(high)
                sums = sums + torch.stack((output.loss_n, *output.extras)) @ scale_n
                if not (wants_hidden or wants_weight):
                    continue
                slope = output.grad_nV.mul_(scale_n[:, None]).to(low)
                if hidden_grad is not None:
                    hidden_grad[part] = (slope @ weight).to(hidden_grad.dtype)
                if weight_grad is not None:
                    add_product(weight_grad, slope.T, hidden[part])
        ctx.save_for_backward(
            hidden_grad, None if weight_grad is None else weight_grad.to(weight_VD.dtype)
        )
        total, seen_K = sums[0], sums[1:]
        ctx.mark_non_differentiable(seen_K)
        return total, seen_K

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        hidden_grad, weight_grad = (
            None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, weight_grad, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def matmul_dtype(hidden_ND: Tensor) -> torch.dtype:
    """The precision of the surrounding autocast, for products with the head."""
    kind = hidden_ND.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype


def token_chunks(tokens: int, vocabulary: int) -> list[slice]:
    """All tokens in chunks; one that is empty where there are none."""
    size = max(MIN_CHUNK_TOKENS, MAX_CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]
