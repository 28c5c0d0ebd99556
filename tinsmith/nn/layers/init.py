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

from torch import Tensor, nn

from tinsmith.nn.moe.experts import ExpertOutWeight, ExpertWeight
from tinsmith.nn.precision import at_least_fp32


class ResidualProj(nn.Linear):
    """A projection that writes into the residual stream."""


class LMHead(nn.Linear):
    """Hidden states to logits; logits are at least float32."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = super().forward(input)
        return logits.to(at_least_fp32(logits.dtype))


def init_weights(model: nn.Module, depth: int) -> None:
    """Give every weight of `model` its first value, from torch's global generator."""
    for module in model.modules():
        if isinstance(module, nn.Embedding | LMHead):
            width = module.weight.shape[1]
            nn.init.normal_(module.weight, std=min(0.02, 0.5 / math.sqrt(width)))
        elif isinstance(module, nn.Linear):
            _spread(module.weight, depth if isinstance(module, ResidualProj) else None)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ExpertWeight):
            _spread(module.weight, depth if isinstance(module, ExpertOutWeight) else None)


def _spread(weight: Tensor, depth: int | None) -> None:
    """Normal, for matrices (..., outputs, inputs); `depth` of those that write into the stream."""
    shrink = 1.0 if depth is None else math.sqrt(2 * depth)
    nn.init.normal_(weight, std=linear_init_std(weight) / shrink)


def linear_init_std(weight: Tensor) -> float:
    """Standard deviation of the first values of matrices (..., outputs, inputs)."""
    return 0.5 / math.sqrt(weight.shape[-1])
