"""The score of an answer: linear in the final hidden state of its last token.

Legend: B rows, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinsmith.core.errors import UserError
from tinsmith.nn.model import LM, ModelOut
from tinsmith.nn.precision import at_least_fp32


class ScoreHead(nn.Module):
    """Hidden state to score: linear, no bias, 0 at the start."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dim))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """(B, D) -> (B,), in at least float32 whatever the surrounding precision."""
        high = at_least_fp32(hidden_BD.dtype)
        return (hidden_BD.to(high) * self.weight.to(high)).sum(-1)


class RewardModel(nn.Module):
    """A trained reward model: ids of prompts with their answers in, scores out. It holds no
    gradients, and reads `rows` of them at a time.
    """

    def __init__(self, lm: LM, weight: Tensor, batch_size: int = 64):
        super().__init__()
        if tuple(weight.shape) != (1, lm.config.dim):
            raise UserError(
                f"the reward model's head is {tuple(weight.shape)}, the model is {lm.config.dim} "
                "wide; they are not of one run"
            )
        self.lm, self.batch_size = lm, batch_size
        self.head = ScoreHead(lm.config.dim).to(lm.embed.weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """(B,) of B rows of ids: each a prompt and its answer with the end of turn."""
        parts = [
            sequences[start : start + self.batch_size]
            for start in range(0, len(sequences), self.batch_size)
        ]
        return torch.cat([self._score(part) for part in parts])

    def _score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device, width = self.lm.embed.weight.device, max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        segments = torch.full_like(ids, -1)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, device=device)
            segments[place, : len(row)] = 0
        return last_token_scores(self.lm, self.head, ids, None, segments)[0]


def last_token_scores(
    lm: LM, head: ScoreHead, ids: Tensor, positions: Tensor | None, segments: Tensor
) -> tuple[Tensor, ModelOut]:
    """The score (B,) of the last token of every row that is padded behind (segment -1)."""
    out = lm(ids, positions, segments, logits=False)
    last = (segments >= 0).sum(1) - 1
    return head(out.hidden[torch.arange(len(ids), device=ids.device), last]), out
