"""Next-token cross-entropy on every token of every document."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.nn.model import LM
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    aux_metrics,
    with_aux,
)
from tinsmith.objectives.logprobs import summed_nll


@dataclass(frozen=True, kw_only=True)
class Pretrain(ObjectiveConfigBase):
    """Predict the next token of documents."""

    kind: Literal["pretrain"] = "pretrain"
    shape: ClassVar[Shape] = "documents"

    def build(self) -> "CrossEntropy":
        """The objective."""
        return CrossEntropy()


class CrossEntropy(Objective):
    """sum over the batch's masked-in targets of -log p(target); the unit is a target token."""

    def weight(self, batch: Batch) -> Tensor:
        """Target tokens that count."""
        return batch.mask.sum()

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """One forward pass over packed rows."""
        out = policy(batch.ids, batch.positions, batch.segments, logits=False)
        total = summed_nll(out.hidden, batch.targets, batch.mask, policy.head)
        count = self.weight(batch)
        metrics = {"loss": Metric(total.detach(), count)} | aux_metrics(out.losses, count)
        return Loss(with_aux(total, out.losses, count), metrics, out.stats, out.probes)
