"""Token log-probabilities without ever holding (tokens x vocabulary).

Softmax and its gradient are formed chunk by chunk in at least float32; products with the head run
in the precision of the surrounding autocast. The backward pass of a cross-entropy needs nothing
that its forward pass has not just had in hand, so both are done there (as in Liger, 2410.10989),
and the head's product is never computed twice.

Legend: N tokens, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tinsmith.nn.parts.norm import wide

ELEMENTS = 2**21
"""Logits held at once."""


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
        kind = hidden_ND.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_ND.dtype
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        with torch.autocast(kind, enabled=False):
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


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
