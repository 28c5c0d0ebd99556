"""Small modules with every kind of parameter, and gradients for them."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn


class Scores(nn.Module):
    ROLE: ClassVar[str] = "router"

    def __init__(self, dim: int, experts: int):
        super().__init__()
        self.gate = nn.Linear(dim, experts)


class Experts(nn.Module):
    EXPERT_STACKS = (
        "up",
        "down",
    )

    def __init__(self, dim: int, hidden: int, experts: int):
        super().__init__()
        self.router = Scores(dim, experts)
        self.up = nn.Parameter(torch.randn(experts, hidden, dim))
        self.down = nn.Parameter(torch.randn(experts, dim, hidden))


class Block(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.mixing = nn.Parameter(torch.randn(4, 4))
        self.experts = Experts(dim, hidden, 3)
        self.temperature = nn.Parameter(torch.ones(()))


class Model(nn.Module):
    """Parameters of a model without forward pass; tests set random gradients."""

    def __init__(self, tied: bool = True, dim: int = 6, hidden: int = 10, vocabulary: int = 12):
        super().__init__()
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.embed = nn.Embedding(vocabulary, dim)
        self.places = nn.Embedding(5, dim)
        self.blocks = nn.ModuleList([Block(dim, hidden), Block(dim, hidden)])
        self.value = nn.Linear(dim, 1)
        if tied:
            self.head.weight = self.embed.weight


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """`make_model(seed, tied=True, dtype=torch.float64)`: equal for equal seeds."""

    def make(seed: int = 0, tied: bool = True, dtype: torch.dtype = torch.float64) -> Model:
        torch.manual_seed(seed)
        return Model(tied).to(dtype)

    return make


@pytest.fixture
def give_gradients() -> Callable[[nn.Module, int], None]:
    """`give_gradients(module, seed)` sets the gradient of every trainable parameter."""

    def give(module: nn.Module, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=source, dtype=torch.float64)
                parameter.grad = noise.to(parameter.dtype)

    return give


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, Tensor]]:
    """`snapshot(module)` -> copies of its parameters by name."""
    return lambda module: {n: p.detach().clone() for n, p in module.named_parameters()}
