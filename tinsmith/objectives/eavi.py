"""EAVI, excursion and alignment (the Tiny-ONN minutes of 2025-08-28): learn the true answer from
the truth's beginnings and from one's own.

    excursion   P = p_1 ... p_S, the policy's own answer from the prompt, no gradient; its length is
                that of the true answer y
    alignment   L_align = sum over s of -log softmax(z(prompt, p_1 ... p_{s-1}))[y_s], one parallel
                forward
    L = (1 - lambda) L_TF + lambda L_align,  L_TF the same from y_1 ... y_{s-1}: teacher forcing

Both are rows of one batch, so the model's own losses (SDL of a router) are added once over both.
What is learned besides the answer, outputs of demonstrations for example, is the same in both rows
and counts once. The unit is a learned token.

Excursion, not variational inference: no posterior, no divergence. Bias: P is held fixed, so the
gradient is not that of the loss as a function of the weights, which move P too; it is exact for
the surrogate with P frozen, as in scheduled sampling (Bengio et al., 1506.03099). Targets stay in
place: after an excursion of another row width they are wrong positions, so `align_equal` is told
apart, of answers with the shape of their input. The true length is known only in training. Rows
are held as (2B, T, V) numbers, which is meant for small vocabularies: `LARGEST` at most.

Legend: B rows, T positions, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.data.lessons import same_shape, speaks_grids
from tinsmith.nn.model import LM
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    aux_metrics,
    with_aux,
)
from tinsmith.objectives.excursion import Span, after, excursion, last_span
from tinsmith.objectives.logprobs import summed_nll, token_nll
from tinsmith.text.tokenizer import Tokenizer

LARGEST = 2**14
"""Ids of a vocabulary; 8 rows of 512 tokens take about a gigabyte with so many."""


@dataclass(frozen=True, kw_only=True)
class EAVI(ObjectiveConfigBase):
    """Answers after the truth's beginnings and after the policy's own."""

    kind: Literal["eavi"] = "eavi"
    shape: ClassVar[Shape] = "answers"
    answers_itself: ClassVar[bool] = True
    excursion: Literal["soft", "hard"] = "soft"
    """Whether the policy goes on with distributions or with its best tokens."""
    temperature: float = 1.0
    """Of soft excursions."""
    align: float = 0.5
    """lambda: the share of alignment; 0 is teacher forcing."""

    def __post_init__(self) -> None:
        if not 0 <= self.align <= 1:
            raise ValueError(f"align={self.align} must be a share from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be a number above 0")

    def build(self) -> "Alignment":
        """The objective."""
        return Alignment(self)


class Alignment(Objective):
    """The objective of `EAVI`. Nothing is remembered and nothing drawn."""

    def __init__(self, config: EAVI):
        super().__init__()
        self.config = config
        self.grids = False

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """See whether answers are grids; UserError where there are too many ids."""
        if tokenizer.vocab_size > LARGEST:
            found, room = f"{tokenizer.vocab_size:,} ids", f"{LARGEST:,}"
            raise UserError(
                f"objective.kind=eavi: {found} are too many: positions hold a number for each id,"
                f" at most {room}; use kd or sft"
            )
        self.grids = speaks_grids(tokenizer)

    def weight(self, batch: Batch) -> Tensor:
        """How many tokens are learned."""
        return batch.mask.sum().to(torch.float32)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """An excursion, then one forward pass over both kinds of rows."""
        span = last_span(batch.mask)
        said_BSV = excursion(
            policy,
            batch.ids,
            span,
            temperature=self.config.temperature,
            hard=self.config.excursion == "hard",
        )
        return self.aligned(policy, batch, span, said_BSV)

    def aligned(self, policy: LM, batch: Batch, span: Span, said_BSV: Tensor) -> Loss:
        """The loss where the policy has said `said_BSV`, which is a constant to it."""
        answer_BT = span.inside(batch.mask)
        true_BTV = said_BSV.new_zeros(*batch.ids.shape, said_BSV.shape[2])
        true_BTV.scatter_(2, batch.ids[..., None], 1.0)
        read_BTV = torch.cat((true_BTV, after(true_BTV, span, said_BSV)))
        out = policy(read_BTV, _twice(batch.positions), _twice(batch.segments), logits=False)
        own_BT = self.config.align * answer_BT.to(said_BSV.dtype)
        weights = torch.cat((batch.mask.to(own_BT.dtype) - own_BT, own_BT))
        total = summed_nll(out.hidden, _twice(batch.targets), weights, policy.head)
        count = self.weight(batch)
        metrics = {"loss": Metric(total.detach(), count)}
        metrics |= self._told(policy, batch, answer_BT, out.hidden.detach())
        metrics |= aux_metrics(out.losses, count)
        return Loss(with_aux(total, out.losses, count), metrics, out.stats, out.probes)

    @torch.no_grad()
    def _told(
        self, policy: LM, batch: Batch, answer_BT: Tensor, hidden: Tensor
    ) -> dict[str, Metric]:
        """Both halves of an answer's loss, and alignment of answers shaped as their inputs."""
        targets, count = batch.targets[answer_BT], answer_BT.sum()
        taught, aligned = (
            token_nll(half[answer_BT], targets, policy.head) for half in hidden.chunk(2)
        )
        told = {"teacher": Metric(taught.sum(), count), "align": Metric(aligned.sum(), count)}
        if self.grids:
            equal = self._equal(batch, answer_BT)[:, None].expand_as(answer_BT)[answer_BT]
            told["align_equal"] = Metric(aligned[equal].sum(), equal.sum())
        return told

    def _equal(self, batch: Batch, answer_BT: Tensor) -> Tensor:
        """(B,) bool: which answers have the shape of their input."""
        found = []
        for ids, answer in zip(batch.ids.tolist(), answer_BT.tolist(), strict=True):
            start, count = answer.index(True) + 1, sum(answer)
            found.append(same_shape(ids, start, start + count))
        return torch.tensor(found, device=answer_BT.device)


def _twice(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows))
