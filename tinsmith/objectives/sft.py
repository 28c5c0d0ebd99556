"""Supervised fine-tuning: next-token cross-entropy on exactly the assistant's tokens of chats."""

from dataclasses import dataclass
from typing import Literal

from tinsmith.data.formats import FormatName
from tinsmith.objectives.base import ObjectiveConfigBase
from tinsmith.objectives.pretrain import CrossEntropy
from tinsmith.objectives.token_weights import TagWeights


@dataclass(frozen=True, kw_only=True)
class SFT(ObjectiveConfigBase):
    """Predict what the assistant says, its end of turn included; the mask comes with the chats."""

    kind: Literal["sft"] = "sft"
    reads: Literal["chats", "answers"] = "chats"
    """Chats packed into rows, where the end of one may go on in another row; or one whole chat to a
    row, where an answer is never without its prompt.
    """
    weights: TagWeights = TagWeights()

    @property
    def data_format(self) -> FormatName:
        """What it reads."""
        return self.reads

    def build(self) -> CrossEntropy:
        """Build the objective."""
        return CrossEntropy(self.weights)
