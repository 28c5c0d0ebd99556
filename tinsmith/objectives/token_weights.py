"""Weights of tags: what makes an answer one that can be read by a program.

In Tinsmith's tokenizers a tag such as `<think>` or `</answer>` is one id of its own, which ordinary
text never becomes, whatever it says; so a tag's whole span is weighted by its id, and nothing else
is. A weight multiplies the mask, and the loss is divided by the sum of weights: rows with many tags
are no longer a reason for a larger step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.core.parse import Config
from tinsmith.data.loader.batch import Batch
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TagWeights(Config):
    """How much a tag counts, opening and closing; any other token counts 1."""

    think: float = 1.0
    answer: float = 1.0
    tool_call: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in self.by_name().items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"{name}={weight} must be a number above 0")

    def by_name(self) -> dict[str, float]:
        """Weights by the tags' names."""
        return {"think": self.think, "answer": self.answer, "tool_call": self.tool_call}


class TokenWeights:
    """Weights of a batch's targets."""

    def __init__(self, weights: TagWeights):
        self._by_name = {name: each for name, each in weights.by_name().items() if each != 1}
        self._by_id: dict[int, float] = {}

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Look up the ids; must come before the first batch."""
        self._by_id = {
            tokenizer.special(tag): weight
            for name, weight in self._by_name.items()
            for tag in (f"<{name}>", f"</{name}>")
        }

    def __call__(self, batch: Batch) -> Tensor:
        """(B, T) float32: 0 where the mask is, a tag's weight, or 1."""
        weights = batch.mask.to(torch.float32)
        for number, weight in self._by_id.items():
            weights = torch.where(batch.targets == number, weights * weight, weights)
        return weights
