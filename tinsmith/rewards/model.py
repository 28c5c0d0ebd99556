"""Reward model: the score of a completion is linear in the final hidden state of its last token.

Legend: B rows, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.nn.model import LM, ModelOut
from tinsmith.nn.precision import at_least_fp32


class ScoreHead(nn.Module):
    """A linear head without bias from hidden state to score, initialised to 0."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Map (B, D) to scores (B,), in at least float32 for any input dtype."""
        dtype = at_least_fp32(hidden_BD.dtype)
        return (hidden_BD.to(dtype) * self.weight.to(dtype)).sum(-1)


class RewardModel(nn.Module):
    """A trained reward model that scores token ids of prompts with their completions.

    It stores no gradients and scores `batch_size` sequences at a time.
    """

    def __init__(self, lm: LM, weight: Tensor, batch_size: int = 64):
        super().__init__()
        if tuple(weight.shape) != (1, lm.config.dim):
            raise UserError(
                f"the reward model's head is {tuple(weight.shape)}, the model is {lm.config.dim} "
                "wide; they are from different runs"
            )
        self.lm, self.batch_size = lm, batch_size
        self.head = ScoreHead(lm.config.dim).to(lm.embed.weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Score sequences of ids: each a prompt and its completion with the end of turn; (B,)."""
        batches = [
            sequences[start : start + self.batch_size]
            for start in range(0, len(sequences), self.batch_size)
        ]
        return torch.cat([self._score(batch) for batch in batches])

    def _score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device, width = self.lm.embed.weight.device, max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        segments = torch.full_like(ids, -1)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
            segments[index, : len(row)] = 0
        return last_token_scores(self.lm, self.head, ids, None, segments)[0]


def last_token_scores(
    lm: LM, head: ScoreHead, ids: Tensor, positions: Tensor | None, segments: Tensor
) -> tuple[Tensor, ModelOut]:
    """Return the score (B,) of the last token of every right-padded row (padding has
    segment -1).
    """
    out = lm(ids, positions, segments, logits=False)
    last = (segments >= 0).sum(1) - 1
    return head(out.hidden[torch.arange(len(ids), device=ids.device), last]), out
