"""All initialisation in one place.

| module | weight |
|---|---|
| Embedding (tied head too), head | normal, std min(0.02, 0.5 / sqrt(width)): first loss is ln V |
| Linear | normal, std 0.5 / sqrt(fan in) |
| Output (writes into the stream) | the same / sqrt(2 depth): the stream does not grow (GPT-2) |
| Stack, OutputStack | each of its matrices as Linear's, as Output's |
| biases | 0; norms 1 (set where they are made, like the mixing weights of residual streams) |
"""

import math

import torch
from torch import Tensor, nn

from tinsmith.nn.parts.norm import wide


class Output(nn.Linear):
    """A projection that writes into the residual stream."""


class Head(nn.Linear):
    """Hidden states to logits; logits are at least float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = super().forward(input)
        return logits.to(wide(logits.dtype))


class Stack(nn.Module):
    """A matrix (O, I) for each of E experts, without biases; `parts.grouped` multiplies by them."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))


class OutputStack(Stack):
    """A stack that writes into the residual stream."""


def initialise(model: nn.Module, depth: int) -> None:
    """Give every weight of `model` its first value, from torch's global generator."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | Head):
            width = module.weight.shape[1]
            nn.init.normal_(module.weight, std=min(0.02, 0.5 / math.sqrt(width)))
        elif isinstance(module, nn.Linear):
            _spread(module.weight, depth if isinstance(module, Output) else None)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Stack):
            _spread(module.weight, depth if isinstance(module, OutputStack) else None)


def _spread(weight: Tensor, depth: int | None) -> None:
    """Normal, for matrices (..., outputs, inputs); `depth` of those that write into the stream."""
    shrink = 1.0 if depth is None else math.sqrt(2 * depth)
    nn.init.normal_(weight, std=first_std(weight) / shrink)


def first_std(weight: Tensor) -> float:
    """Standard deviation of the first values of matrices (..., outputs, inputs)."""
    return 0.5 / math.sqrt(weight.shape[-1])
