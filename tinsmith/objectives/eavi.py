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

What the policy would have said: answers of a given length that it goes on with by itself, in the
distributions of its tokens or in its best ones. Nothing here has a gradient.

    z_s = logits after the prompt and p_1 ... p_{s-1};   p_s = softmax(z_s / temperature)

A distribution is read as the same mixture of embeddings.

Legend: B rows, T positions of a row, S tokens of the longest answer, V vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinsmith.core.errors import UserError
from tinsmith.data.arc.encoding import answer_has_input_shape, is_grid_tokenizer
from tinsmith.data.formats import FormatName
from tinsmith.data.loader.batch import Batch
from tinsmith.infer.generate import eval_mode
from tinsmith.losses.logprobs import summed_nll, token_nll
from tinsmith.nn.model import LM
from tinsmith.nn.precision import at_least_fp32
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    add_aux_losses,
    aux_metrics,
)
from tinsmith.text.tokenizer import Tokenizer


class AnswerSpan(NamedTuple):
    """Where answers stand in their rows."""

    opener_B: Tensor
    """The position that predicts an answer's first token."""
    length_B: Tensor
    """Tokens of the answer, its end included."""

    def target_mask(self, mask_BT: Tensor) -> Tensor:
        """(B, T) bool: the positions of rows like these that predict the answer."""
        index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        step_BT = index_T - self.opener_B[:, None]
        return (step_BT >= 0) & (step_BT < self.length_B[:, None])


def last_answer_span(mask_BT: Tensor) -> AnswerSpan:
    """Of every row the last run of targets that count; all rows must have one."""
    index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    end_B = torch.where(mask_BT, index_T, -1).amax(1)
    gap_BT = ~mask_BT & (index_T < end_B[:, None])
    before_B = torch.where(gap_BT, index_T, -1).amax(1)
    assert bool((end_B >= 0).all()), "every row needs a target"
    return AnswerSpan(before_B + 1, end_B - before_B)


@torch.no_grad()
def excursion(
    lm: LM, ids_BT: Tensor, span: AnswerSpan, *, temperature: float, hard: bool
) -> Tensor:
    """(B, S, V): p_1 ... p_S of every row's answer, one-hot where `hard`; 0 behind the answer.

    Rows are read up to their openers, never behind them. The model is in eval mode meanwhile and
    as before afterwards; no random number is drawn.
    """
    lengths = span.length_B.tolist()
    longest, vocabulary = max(lengths), lm.config.vocab_size
    output_BSV = torch.zeros(
        *(len(lengths), longest, vocabulary),
        dtype=at_least_fp32(lm.embed.weight.dtype),
        device=ids_BT.device,
    )
    with eval_mode(lm):
        ids, segments = _prompts(ids_BT, span.opener_B)
        caches = lm.new_caches(len(lengths), ids.shape[1] + longest)
        logits = lm(ids, segments=segments, caches=caches, logits="last").logits
        rows = torch.arange(len(lengths), device=ids_BT.device)
        for step in range(longest):
            assert logits is not None
            output_BSV[rows, step] = _chosen(logits[:, -1], temperature, hard).to(output_BSV)
            left = span.length_B[rows] > step + 1
            if not bool(left.all()):  # these say no more
                kept = left.nonzero()[:, 0]
                rows = rows[kept]
                for cache in caches:
                    cache.select(kept)
            if len(rows):
                newest = output_BSV[rows, step][:, None]
                logits = lm(newest, caches=caches, logits="last").logits
    return output_BSV


def splice_excursion(true_BTV: Tensor, span: AnswerSpan, excursion_BSV: Tensor) -> Tensor:
    """(B, T, V): one-hot rows as the policy is to read them after an excursion, with what it said
    in the place of the answers' tokens but the last.
    """
    index_T = torch.arange(true_BTV.shape[1], device=true_BTV.device)
    step_BT = index_T - span.opener_B[:, None] - 1
    rows, places = ((step_BT >= 0) & (step_BT < span.length_B[:, None] - 1)).nonzero(as_tuple=True)
    read_BTV = true_BTV.clone()
    read_BTV[rows, places] = excursion_BSV[rows, step_BT[rows, places]]
    return read_BTV


def _prompts(ids_BT: Tensor, opener_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ids up to the openers, padded on the left, and segments: -1 for padding."""
    width = int(opener_B.max()) + 1
    index_BT = torch.arange(width, device=ids_BT.device) - (width - 1 - opener_B)[:, None]
    segments_BT = torch.where(index_BT < 0, -1, 0)
    return ids_BT.gather(1, index_BT.clamp(min=0)), segments_BT


def _chosen(logits_BV: Tensor, temperature: float, hard: bool) -> Tensor:
    high = logits_BV.to(at_least_fp32(logits_BV.dtype))
    if hard:
        return F.one_hot(high.argmax(-1), high.shape[-1])
    return (high / temperature).softmax(-1)


MAX_VOCAB_SIZE = 2**14
"""Ids of a vocabulary; 8 rows of 512 tokens take about a gigabyte with so many."""


@dataclass(frozen=True, kw_only=True)
class EAVI(ObjectiveConfigBase):
    """Answers after the truth's beginnings and after the policy's own."""

    kind: Literal["eavi"] = "eavi"
    data_format: ClassVar[FormatName] = "answers"
    generates: ClassVar[bool] = True
    excursion: Literal["soft", "hard"] = "soft"
    """Whether the policy goes on with distributions or with its best tokens."""
    temperature: float = 1.0
    """Of soft excursions."""
    alignment_weight: float = 0.5
    """lambda: the share of alignment; 0 is teacher forcing."""

    def __post_init__(self) -> None:
        if not 0 <= self.alignment_weight <= 1:
            raise ValueError(
                f"alignment_weight={self.alignment_weight} must be a share from 0 to 1"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be a number above 0")

    def build(self) -> "EAVIObjective":
        """Build the objective."""
        return EAVIObjective(self)


class EAVIObjective(Objective):
    """The objective of `EAVI`. Nothing is remembered and nothing drawn."""

    def __init__(self, config: EAVI):
        super().__init__()
        self.config = config
        self.grids = False

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """See whether answers are grids; UserError where there are too many ids."""
        if tokenizer.vocab_size > MAX_VOCAB_SIZE:
            found, room = f"{tokenizer.vocab_size:,} ids", f"{MAX_VOCAB_SIZE:,}"
            raise UserError(
                f"objective.kind=eavi: {found} are too many: positions hold a number for each id,"
                f" at most {room}; use kd or sft"
            )
        self.grids = is_grid_tokenizer(tokenizer)

    def units(self, batch: Batch) -> Tensor:
        """How many tokens are learned."""
        return batch.mask.sum().to(torch.float32)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """An excursion, then one forward pass over both kinds of rows."""
        span = last_answer_span(batch.mask)
        output_BSV = excursion(
            policy,
            batch.ids,
            span,
            temperature=self.config.temperature,
            hard=self.config.excursion == "hard",
        )
        return self.loss_given_excursion(policy, batch, span, output_BSV)

    def loss_given_excursion(
        self, policy: LM, batch: Batch, span: AnswerSpan, excursion_BSV: Tensor
    ) -> Loss:
        """The loss where the policy has said `said_BSV`, which is a constant to it."""
        answer_BT = span.target_mask(batch.mask)
        true_BTV = excursion_BSV.new_zeros(*batch.ids.shape, excursion_BSV.shape[2])
        true_BTV.scatter_(2, batch.ids[..., None], 1.0)
        read_BTV = torch.cat((true_BTV, splice_excursion(true_BTV, span, excursion_BSV)))
        out = policy(read_BTV, _twice(batch.positions), _twice(batch.segments), logits=False)
        own_BT = self.config.alignment_weight * answer_BT.to(excursion_BSV.dtype)
        weights = torch.cat((batch.mask.to(own_BT.dtype) - own_BT, own_BT))
        total = summed_nll(out.hidden, _twice(batch.targets), weights, policy.head)
        count = self.units(batch)
        metrics = {"loss": Metric(total.detach(), count)}
        metrics |= self._reported(policy, batch, answer_BT, out.hidden.detach())
        metrics |= aux_metrics(out.losses, count)
        return Loss(add_aux_losses(total, out.losses, count), metrics, out.stats, out.grad_probes)

    @torch.no_grad()
    def _reported(
        self, policy: LM, batch: Batch, answer_BT: Tensor, hidden: Tensor
    ) -> dict[str, Metric]:
        """Both halves of an answer's loss, and alignment of answers shaped as their inputs."""
        targets, count = batch.targets[answer_BT], answer_BT.sum()
        taught, aligned = (
            token_nll(half[answer_BT], targets, policy.head) for half in hidden.chunk(2)
        )
        reported = {
            "teacher_forcing_loss": Metric(taught.sum(), count),
            "alignment_loss": Metric(aligned.sum(), count),
        }
        if self.grids:
            equal = self._equal(batch, answer_BT)[:, None].expand_as(answer_BT)[answer_BT]
            reported["alignment_loss_equal_shape"] = Metric(aligned[equal].sum(), equal.sum())
        return reported

    def _equal(self, batch: Batch, answer_BT: Tensor) -> Tensor:
        """(B,) bool: which answers have the shape of their input."""
        found = []
        for ids, answer in zip(batch.ids.tolist(), answer_BT.tolist(), strict=True):
            start, count = answer.index(True) + 1, sum(answer)
            found.append(answer_has_input_shape(ids, start, start + count))
        return torch.tensor(found, device=answer_BT.device)


def _twice(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows))
