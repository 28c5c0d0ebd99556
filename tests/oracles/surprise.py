"""Experts chosen by thresholds, token by token and with every expert run on every token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def copies(experts: nn.Module, tokens: int) -> dict[str, Tensor]:
    """The weights of all experts once for each token: name -> (N, E, O, I), leaves."""
    return {
        name: stack.weight.detach().expand(tokens, *stack.weight.shape).clone().requires_grad_()
        for name, stack in experts.named_children()
    }


def output(x_ND: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """(N, E, D): what every expert says to every token; weights (N or 1, E, O, I)."""
    up = torch.einsum("neoi,ni->neo", weights["up_proj"], x_ND)
    if "gate_proj" in weights:
        inner = F.silu(torch.einsum("neoi,ni->neo", weights["gate_proj"], x_ND)) * up
    else:
        inner = F.relu(up) ** 2
    return torch.einsum("neoi,nei->neo", weights["down_proj"], inner)


def dense(x_ND: Tensor, weights: dict[str, Tensor], weight_NE: Tensor, mask_NE: Tensor) -> Tensor:
    """(N, D): the weighted sum over the masked experts of each token."""
    return torch.einsum("ne,ned->nd", weight_NE.where(mask_NE, 0), output(x_ND, weights))


def causal_loss(y_ND: Tensor) -> Tensor:
    """A loss through a causal attention over all tokens, so that a token matters to later ones."""
    made, width = torch.Generator().manual_seed(11), y_ND.shape[1]
    q, k, v = (
        y_ND @ torch.randn(width, width, generator=made, dtype=torch.float64).to(y_ND) / width**0.5
        for _ in range(3)
    )
    future = torch.ones(len(q), len(q)).triu(1).bool()
    scores = (q @ k.T / width**0.5).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ v + y_ND).cos().sum(-1).mean()
