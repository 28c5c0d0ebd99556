"""Supervised fine-tuning: next-token cross-entropy on exactly the assistant's tokens of chats."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tinsmith.data.config import Shape
from tinsmith.objectives.base import ObjectiveConfigBase
from tinsmith.objectives.pretrain import CrossEntropy
from tinsmith.objectives.tags import TagWeights


@dataclass(frozen=True, kw_only=True)
class SFT(ObjectiveConfigBase):
    """Predict what the assistant says, its end of turn included; the mask comes with the chats."""

    kind: Literal["sft"] = "sft"
    shape: ClassVar[Shape] = "chats"
    weights: TagWeights = TagWeights()

    def build(self) -> CrossEntropy:
        """The objective."""
        return CrossEntropy(self.weights)
