"""Weights of tags in the loss, for completions that a program can parse.

In Tinsmith's tokenizers a tag such as `<think>` or `</answer>` is a single token id, which ordinary
text never becomes; so the id identifies the complete tag, and nothing else gets its weight. A
weight multiplies the mask, and the loss is divided by the sum of weights, so rows with many tags do
not increase the step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinsmith.core.parse import Config
from tinsmith.data.loader.batch import Batch
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TagWeights(Config):
    """Weights of opening and closing tags; all other tokens have weight 1."""

    think: float = 1.0
    answer: float = 1.0
    tool_call: float = 1.0

    def __post_init__(self) -> None:
        for name, weight in self.by_name().items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"{name}={weight} must be a number above 0")

    def by_name(self) -> dict[str, float]:
        """Return the weights by tag name."""
        return {"think": self.think, "answer": self.answer, "tool_call": self.tool_call}


class TokenWeights:
    """The weights of a batch's targets."""

    def __init__(self, weights: TagWeights):
        self._by_name = {name: weight for name, weight in weights.by_name().items() if weight != 1}
        self._by_id: dict[int, float] = {}

    def prepare(self, tokenizer: Tokenizer) -> None:
        """Look up the token ids of tags; call it before the first batch."""
        self._by_id = {
            tokenizer.special(tag): weight
            for name, weight in self._by_name.items()
            for tag in (f"<{name}>", f"</{name}>")
        }

    def __call__(self, batch: Batch) -> Tensor:
        """Return weights (B, T) float32: 0 where the mask is 0, a tag's weight, or 1."""
        weights = batch.mask.to(torch.float32)
        for token_id, weight in self._by_id.items():
            weights = torch.where(batch.targets == token_id, weights * weight, weights)
        return weights
