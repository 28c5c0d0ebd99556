"""Supervised fine-tuning (SFT): next-token cross-entropy on the assistant's tokens of chats."""

from dataclasses import dataclass
from typing import Literal

from tinsmith.data.formats import FormatName
from tinsmith.objectives.base import ObjectiveConfigBase
from tinsmith.objectives.pretrain import CrossEntropy
from tinsmith.objectives.token_weights import TagWeights


@dataclass(frozen=True, kw_only=True)
class SFT(ObjectiveConfigBase):
    """Learn the assistant's messages, end-of-turn tokens included; the loss mask comes
    with chats.
    """

    kind: Literal["sft"] = "sft"
    reads: Literal["chats", "answers"] = "chats"
    """`chats` packs chats into rows, and a chat may be split between two rows; `answers` puts one
    complete chat in each row, so an answer is always after its prompt.
    """
    weights: TagWeights = TagWeights()

    @property
    def data_format(self) -> FormatName:
        """The data format that `reads` selects."""
        return self.reads

    def build(self) -> CrossEntropy:
        """Build the objective."""
        return CrossEntropy(self.weights)
