"""Linear layers with a role in the model, and the initialisation of all weights.

| module | weight |
|---|---|
| Embedding (tied head too), head | normal, std min(0.02, 0.5 / sqrt(width)): first loss is ln V |
| Linear | normal, std 0.5 / sqrt(fan in) |
| ResidualProj | the same / sqrt(2 depth), so that the residual stream does not grow (GPT-2) |
| ExpertWeight, ExpertOutWeight | each matrix as Linear, as ResidualProj |
| biases | 0; norms 1 (set in their modules, like the mixing weights of residual streams) |
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from tinsmith.nn.precision import at_least_fp32


class ResidualProj(nn.Linear):
    """A linear layer whose output is added to the residual stream."""


class LMHead(nn.Linear):
    """The output head from hidden states to logits, which are at least float32."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to logits (..., V)."""
        logits = super().forward(input)
        return logits.to(at_least_fp32(logits.dtype))


class ExpertWeight(nn.Module):
    """A stack of matrices (E, O, I), one for each expert, without biases."""

    EXPERT_STACKS: ClassVar[tuple[str, ...]] = ("weight",)
    """Names of 3-D parameters that are stacks of matrices. LoRA, quantisation and Muon treat each
    slice of them as a matrix. Any other 3-D parameter, such as a convolution kernel, is not one.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))


class ExpertOutWeight(ExpertWeight):
    """A stack of matrices whose output is added to the residual stream."""


def init_weights(model: nn.Module, depth: int) -> None:
    """Initialise every weight of `model` from torch's global generator."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | LMHead):
            width = module.weight.shape[1]
            nn.init.normal_(module.weight, std=min(0.02, 0.5 / math.sqrt(width)))
        elif isinstance(module, nn.Linear):
            _init_normal(module.weight, depth if isinstance(module, ResidualProj) else None)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ExpertWeight):
            _init_normal(module.weight, depth if isinstance(module, ExpertOutWeight) else None)


def _init_normal(weight: Tensor, depth: int | None) -> None:
    """Initialise matrices (..., outputs, inputs); `depth` is given for residual projections."""
    divisor = 1.0 if depth is None else math.sqrt(2 * depth)
    nn.init.normal_(weight, std=linear_init_std(weight) / divisor)


def linear_init_std(weight: Tensor) -> float:
    """Return the initial standard deviation of matrices (..., outputs, inputs)."""
    return 0.5 / math.sqrt(weight.shape[-1])
