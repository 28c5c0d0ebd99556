"""Pretraining: next-token cross-entropy on all tokens of documents."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tinsmith.data.formats import FormatName
from tinsmith.data.loader.batch import Batch
from tinsmith.losses.logprobs import summed_nll
from tinsmith.nn.model import LM
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    add_aux_losses,
    aux_metrics,
)
from tinsmith.objectives.token_weights import TagWeights, TokenWeights
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Pretrain(ObjectiveConfigBase):
    """Learn to predict the next token of documents."""

    kind: Literal["pretrain"] = "pretrain"
    data_format: ClassVar[FormatName] = "documents"

    def build(self) -> "CrossEntropy":
        """Build the objective."""
        return CrossEntropy(TagWeights())


class CrossEntropy(Objective):
    """The sum over targets with mask 1 of weight * -log p(target); the unit is a target's weight.

    Weights are 1 except for tags.
    """

    def __init__(self, weights: TagWeights):
        super().__init__()
        self.token_weights = TokenWeights(weights)

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Look up the token ids of tags."""
        self.token_weights.prepare(tokenizer)

    def units(self, batch: Batch) -> Tensor:
        """Return the sum of the targets' weights."""
        return self.token_weights(batch).sum()

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """Run one forward pass over packed rows."""
        out = policy(batch.ids, batch.positions, batch.segments, logits=False)
        weights = self.token_weights(batch)
        total = summed_nll(out.hidden, batch.targets, weights, policy.head)
        count = weights.sum()
        metrics = {"loss": Metric(total.detach(), count)} | aux_metrics(out.losses, count)
        return Loss(add_aux_losses(total, out.losses, count), metrics, out.stats, out.grad_probes)
