"""A reward model: how good an answer is, learned from which of two was preferred.

    P(chosen is better) = sigmoid(score(chosen) - score(rejected))

Bradley and Terry, 1952; as a model's head: Ouyang et al., 2203.02155, section 3.5. The score is
linear in the final hidden state of the answer's last token, which has read all of it. Scores mean
nothing but by their differences; `center` keeps their mean near 0 (Eisenstein et al., 2312.09244,
section 2.1).

Legend: B rows, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tinsmith.core.errors import UserError
from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.nn.model import LM, ModelOut
from tinsmith.nn.parts.norm import wide
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    aux_metrics,
    with_aux,
)
from tinsmith.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Reward(ObjectiveConfigBase):
    """Give the chosen answers of pairs a higher score than the rejected ones."""

    kind: Literal["reward"] = "reward"
    shape: ClassVar[Shape] = "pairs"
    center: float = 0.0
    """Times the square of the sum of a pair's scores, added to its loss."""

    def __post_init__(self) -> None:
        if not self.center >= 0:
            raise ValueError(f"center={self.center} must be 0 or above")

    def build(self) -> "BradleyTerry":
        """The objective."""
        return BradleyTerry(self)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center: float = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected) + center (chosen + rejected)^2, of scores (B,), (B,)."""
    return -logsigmoid(chosen - rejected) + center * (chosen + rejected).square()


class ScoreHead(nn.Module):
    """Hidden state to score: linear, no bias, 0 at the start."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """(B, D) -> (B,), in at least float32 whatever the surrounding precision."""
        high = wide(hidden_BD.dtype)
        return (hidden_BD.to(high) * self.weight.to(high)).sum(-1)


class BradleyTerry(Objective):
    """sum over pairs of -log P(chosen is better); the unit is a pair. Rows of a batch come as
    pairs: chosen, rejected, chosen, rejected, ...
    """

    head: ScoreHead

    def __init__(self, config: Reward):
        super().__init__()
        self.config = config

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """A head of the policy's width."""
        self.head = ScoreHead(policy.config.dim).to(policy.embed.weight.device)

    def weight(self, batch: Batch) -> Tensor:
        """Pairs."""
        return torch.tensor(len(batch.ids) // 2, device=batch.ids.device)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """One forward pass over both sides."""
        assert len(batch.ids) % 2 == 0, "a batch of pairs has two rows for each"
        scores, out = last_scores(policy, self.head, batch.ids, batch.positions, batch.segments)
        chosen, rejected = scores[0::2], scores[1::2]
        loss = bradley_terry_loss(chosen, rejected, self.config.center)
        pairs = self.weight(batch)
        values = {
            "loss": loss,
            "accuracy": (chosen > rejected).float(),
            "margin": chosen - rejected,
            "chosen_score": chosen,
            "rejected_score": rejected,
        }
        metrics = {key: Metric(value.detach().sum(), pairs) for key, value in values.items()}
        total = with_aux(loss.sum(), out.losses, pairs)
        return Loss(total, metrics | aux_metrics(out.losses, pairs), out.stats, out.probes)


class Scorer(nn.Module):
    """A trained reward model, as a reward: ids of prompts with their answers in, scores out."""

    def __init__(self, lm: LM, weight: Tensor):
        super().__init__()
        if tuple(weight.shape) != (1, lm.config.dim):
            raise UserError(
                f"the reward model's head is {tuple(weight.shape)}, the model is {lm.config.dim} "
                "wide; they are not of one run"
            )
        self.lm = lm
        self.head = ScoreHead(lm.config.dim).to(lm.embed.weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(B,) of B rows of ids: each a prompt and its answer with the end of turn."""
        device, width = self.lm.embed.weight.device, max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        segments = torch.full_like(ids, -1)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, device=device)
            segments[place, : len(row)] = 0
        return last_scores(self.lm, self.head, ids, None, segments)[0]


def last_scores(
    lm: LM, head: ScoreHead, ids: Tensor, positions: Tensor | None, segments: Tensor
) -> tuple[Tensor, ModelOut]:
    """The score (B,) of the last token of every row that is padded behind (segment -1)."""
    out = lm(ids, positions, segments, logits=False)
    last = (segments >= 0).sum(1) - 1
    return head(out.hidden[torch.arange(len(ids), device=ids.device), last]), out
