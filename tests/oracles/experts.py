"""Routed feed-forwards written out: every expert on every token, masked, one einsum each."""

import torch
import torch.nn.functional as F
from torch import Tensor


def every_expert(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
    """x (N, D), up and gate (E, H, D), down (E, D, H) -> (N, E, D)."""
    inner = torch.einsum("nd,ehd->neh", x, up)
    if gate is None:
        inner = inner.clamp(min=0) ** 2
    else:
        inner = F.silu(torch.einsum("nd,ehd->neh", x, gate)) * inner
    return torch.einsum("neh,edh->ned", inner, down)


def chosen(scores: Tensor, count: int) -> Tensor:
    """(N, E) -> bool: the best `count` of each row, by a full sort; ties to the smaller index."""
    best = (-scores.detach()).sort(dim=-1, stable=True).indices[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)


def in_groups(scores: Tensor, groups: int, kept: int) -> Tensor:
    """Scores of experts whose group is not among the best `kept` (by the sum of their two best) at
    -inf, group by group.
    """
    parts = scores.chunk(groups, -1)
    values = torch.stack([part.sort(-1).values[:, -2:].sum(-1) for part in parts], -1)
    best = chosen(values, kept)
    closed = [part.masked_fill(~best[:, g : g + 1], -torch.inf) for g, part in enumerate(parts)]
    return torch.cat(closed, -1)


def weights(scores: Tensor, mask: Tensor, renormalise: bool) -> Tensor:
    """(N, E): scores where chosen, else 0; sums of 1 if asked for and more than one is chosen."""
    kept = scores * mask
    return kept / kept.sum(-1, keepdim=True) if renormalise and mask[0].sum() > 1 else kept


def combined(table: Tensor, output: Tensor) -> Tensor:
    """sum_e w_ne f_e(x_n)."""
    return torch.einsum("ne,ned->nd", table, output)


def switch_loss(probabilities: Tensor, mask: Tensor) -> Tensor:
    """E sum_e f_e P_e over the rows given."""
    return probabilities.shape[1] * (mask.double().mean(0) * probabilities.mean(0)).sum()
