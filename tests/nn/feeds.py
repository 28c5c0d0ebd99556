"""Inputs and dense references for tests of routed feed-forwards."""

import torch
from torch import Tensor

from tests.oracles import experts as oracle
from tinsmith.nn.contract import BuildContext, Ctx

DIM, ROWS, TOKENS = 16, 3, 11
SITE = BuildContext(dim=DIM, layer_idx=0, depth=2)
SEGMENTS = torch.tensor([[-1] * 3 + [0] * 8, [0] * 5 + [1] * 6, [0] * 9 + [-1] * 2])


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def context(segments: Tensor | None = None, rows: int = ROWS, tokens: int = TOKENS) -> Ctx:
    """Rows from their beginnings."""
    return Ctx(torch.arange(tokens).expand(rows, tokens), segments)


def dense(feed, x: Tensor, table: Tensor) -> Tensor:
    """(N, D) -> every expert of `feed` on every token, weighted by `table` (N, E), and the shared
    ones.
    """
    stacks = feed.experts
    gate = None if stacks.gate_proj is None else stacks.gate_proj.weight
    output = oracle.every_expert(x, stacks.up_proj.weight, stacks.down_proj.weight, gate)
    y = oracle.combined(table, output)
    return y if feed.shared is None else y + feed.shared(x[None], context()).y[0]
