"""Reward modeling: learn to score completions from pairs of which one was preferred.

    P(chosen is better) = sigmoid(score(chosen) - score(rejected))

Bradley and Terry, 1952; as a model's head: Ouyang et al., 2203.02155, section 3.5. The score is
linear in the final hidden state of the completion's last token, which has attended to all of it.
Only differences of scores are meaningful; `center` keeps their mean near 0 (Eisenstein et al.,
2312.09244, section 2.1).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tinsmith.data.formats import FormatName
from tinsmith.data.loader.batch import Batch
from tinsmith.losses.preference import bradley_terry_loss
from tinsmith.nn.model import LM
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    add_aux_losses,
    aux_metrics,
)
from tinsmith.rewards.model import ScoreHead, last_token_scores
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RewardModeling(ObjectiveConfigBase):
    """Give the chosen completions of pairs higher scores than the rejected ones."""

    kind: Literal["reward"] = "reward"
    data_format: ClassVar[FormatName] = "pairs"
    center: float = 0.0
    """Weight of the squared sum of a pair's scores in its loss."""

    def __post_init__(self) -> None:
        if not self.center >= 0:
            raise ValueError(f"center={self.center} must be 0 or above")

    def build(self) -> "BradleyTerry":
        """Build the objective."""
        return BradleyTerry(self)


class BradleyTerry(Objective):
    """The sum over pairs of -log P(chosen is better); the unit is a pair.

    The rows of a batch alternate: chosen, rejected, chosen, rejected, ...
    """

    head: ScoreHead

    def __init__(self, config: RewardModeling):
        super().__init__()
        self.config = config

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Create a score head of the policy's width."""
        self.head = ScoreHead(policy.config.dim).to(policy.embed.weight.device)

    def units(self, batch: Batch) -> Tensor:
        """Count the pairs of the batch."""
        return torch.tensor(len(batch.ids) // 2, device=batch.ids.device)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """Run one forward pass over both sides."""
        assert len(batch.ids) % 2 == 0, "a batch of pairs has two rows for each"
        scores, out = last_token_scores(
            policy, self.head, batch.ids, batch.positions, batch.segments
        )
        chosen, rejected = scores[0::2], scores[1::2]
        loss = bradley_terry_loss(chosen, rejected, self.config.center)
        pairs = self.units(batch)
        values = {
            "loss": loss,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        metrics = {key: Metric(value.detach().sum(), pairs) for key, value in values.items()}
        total = add_aux_losses(loss.sum(), out.losses, pairs)
        return Loss(total, metrics | aux_metrics(out.losses, pairs), out.stats, out.grad_probes)
