"""Sum a loss of logits without storing all logits (tokens x vocabulary).

If the loss is a function of one token's logits, its gradient with respect to the logits is known
together with its value. So the gradients of hidden states and head are computed chunk by chunk in
the forward pass (as in Liger, 2410.10989): no tensor of (tokens x vocabulary) is saved for
backward, and the product with the head is not computed twice. Losses and gradients of logits are in
at least float32, products with the head in the precision of autocast.

Legend: N tokens, n tokens of a chunk, D width, V vocabulary, K extra values per token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinsmith.nn.precision import at_least_fp32

MAX_CHUNK_LOGITS = 2**21
"""Largest number of logits in memory at once."""
MIN_CHUNK_TOKENS = 64
"""Smallest chunk: the gradient of the head is read and written once per chunk."""


class TokenLosses(NamedTuple):
    """The losses of n tokens and their gradients."""

    loss_n: Tensor
    grad_nV: Tensor
    """Gradient of the loss with respect to the logits; the caller may overwrite it."""
    extras: tuple[Tensor, ...] = ()
    """Other values of each token (n,), without gradient, for metrics."""


TokenLossFn = Callable[[Tensor, slice], TokenLosses]
"""Function of logits (n, V) in at least float32, and of the slice of tokens they belong to."""


def chunked_head_loss(
    hidden_ND: Tensor, weight_VD: Tensor, weights_N: Tensor, loss_fn: TokenLossFn
) -> tuple[Tensor, Tensor]:
    """Return the weighted sum of the token losses of logits hidden @ weight.T, and of the extras.

    The sum is a scalar in at least float32, 0 without tokens. The sums of the extras, (K,), have no
    gradient.
    """
    return _ChunkedHeadLoss.apply(hidden_ND, weight_VD, weights_N, loss_fn)  # type: ignore[return-value]


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, weights_N: Tensor, loss_fn: TokenLossFn
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]  # a frozen head has none
        matmul_type, loss_type = matmul_dtype(hidden_ND), at_least_fp32(hidden_ND.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            hidden, weight = hidden_ND.detach().to(matmul_type), weight_VD.detach().to(matmul_type)
            hidden_grad = torch.empty_like(hidden_ND) if needs_hidden else None
            grad_type = at_least_fp32(weight_VD.dtype)
            weight_grad = torch.zeros_like(weight_VD, dtype=grad_type) if needs_weight else None
            sums = torch.zeros((), dtype=loss_type, device=hidden.device)
            for chunk in token_chunks(len(hidden), len(weight)):
                losses = loss_fn((hidden[chunk] @ weight.T).to(loss_type), chunk)
                scale_n = weights_N[chunk].to(loss_type)
                sums = sums + torch.stack((losses.loss_n, *losses.extras)) @ scale_n
                if not (needs_hidden or needs_weight):
                    continue
                logit_grad = losses.grad_nV.mul_(scale_n[:, None]).to(matmul_type)
                if hidden_grad is not None:
                    hidden_grad[chunk] = (logit_grad @ weight).to(hidden_grad.dtype)
                if weight_grad is not None:
                    add_product(weight_grad, logit_grad.T, hidden[chunk])
        ctx.save_for_backward(
            hidden_grad, None if weight_grad is None else weight_grad.to(weight_VD.dtype)
        )
        total, extras_K = sums[0], sums[1:]
        ctx.mark_non_differentiable(extras_K)
        return total, extras_K

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scale = upstream[0]
        hidden_grad, weight_grad = (
            None if grad is None else grad * scale.to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden_grad, weight_grad, None, None


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def matmul_dtype(hidden_ND: Tensor) -> torch.dtype:
    """Return the dtype of autocast, for products with the head."""
    device_type = hidden_ND.device.type
    return (
        torch.get_autocast_dtype(device_type)
        if torch.is_autocast_enabled(device_type)
        else hidden_ND.dtype
    )


def token_chunks(tokens: int, vocabulary: int) -> list[slice]:
    """Return slices that cover all tokens; one empty slice if there are none."""
    size = max(MIN_CHUNK_TOKENS, MAX_CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]
