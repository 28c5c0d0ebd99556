"""EAVI, excursion and alignment (the Tiny-ONN minutes of 2025-08-28): learn the true answer after
prefixes of the truth and after prefixes of the policy's own answer.

    excursion   P = p_1 ... p_S, the policy's own answer to the prompt, without gradient; its length
                is that of the true answer y
    alignment   L_align = sum over s of -log softmax(z(prompt, p_1 ... p_{s-1}))[y_s], one parallel
                forward pass
    L = (1 - lambda) L_TF + lambda L_align,  L_TF the same after y_1 ... y_{s-1}: teacher forcing

Both kinds are rows of one batch, so the model's auxiliary losses (SDL of a router) are added once
over both. Targets outside of the answer, such as outputs of demonstrations, are the same in both
rows and count once. The unit is a target.

The excursion of the policy:

    z_s = logits after the prompt and p_1 ... p_{s-1};   p_s = softmax(z_s / temperature)

or the one-hot argmax of z_s (`hard`). The model reads a distribution as the mixture of embeddings
with the same weights.

This is not variational inference: there is no posterior and no divergence. Bias: P is held
constant, so the gradient is not that of the loss as a function of the weights, which also change P;
it is exact for the surrogate with P constant, as in scheduled sampling (Bengio et al., 1506.03099).
Targets keep their positions: after an excursion with another row width the positions are wrong, so
the alignment loss is also reported separately for answers with the shape of their input. The true
length is known only in training. Rows are stored as (2B, T, V) tensors, which is meant for small
vocabularies of at most `MAX_VOCAB_SIZE` ids.

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
    """The positions of answers in their rows."""

    opener_B: Tensor
    """Position that predicts the answer's first token."""
    length_B: Tensor
    """Number of tokens of the answer, its end included."""

    def target_mask(self, mask_BT: Tensor) -> Tensor:
        """Return (B, T) bool: the positions that predict the answer."""
        index_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
        step_BT = index_T - self.opener_B[:, None]
        return (step_BT >= 0) & (step_BT < self.length_B[:, None])


def last_answer_span(mask_BT: Tensor) -> AnswerSpan:
    """Return the last run of targets in every row; every row must have a target."""
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
    """Return p_1 ... p_S of every row's answer, (B, S, V), one-hot if `hard`; 0 after the answer.

    Rows are read only up to the answer. The model is in eval mode inside, and restored afterwards;
    no random number is drawn.
    """
    lengths = span.length_B.tolist()
    longest, vocabulary = max(lengths), lm.config.vocab_size
    excursion_BSV = torch.zeros(
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
            excursion_BSV[rows, step] = _next_input(logits[:, -1], temperature, hard).to(
                excursion_BSV
            )
            continues = span.length_B[rows] > step + 1
            if not bool(continues.all()):  # some answers are complete
                remaining = continues.nonzero()[:, 0]
                rows = rows[remaining]
                for cache in caches:
                    cache.select(remaining)
            if len(rows):
                newest = excursion_BSV[rows, step][:, None]
                logits = lm(newest, caches=caches, logits="last").logits
    return excursion_BSV


def splice_excursion(true_BTV: Tensor, span: AnswerSpan, excursion_BSV: Tensor) -> Tensor:
    """Replace the answer's tokens, except the last, by the excursion in one-hot rows, (B, T, V)."""
    index_T = torch.arange(true_BTV.shape[1], device=true_BTV.device)
    step_BT = index_T - span.opener_B[:, None] - 1
    rows, positions = ((step_BT >= 0) & (step_BT < span.length_B[:, None] - 1)).nonzero(
        as_tuple=True
    )
    spliced_BTV = true_BTV.clone()
    spliced_BTV[rows, positions] = excursion_BSV[rows, step_BT[rows, positions]]
    return spliced_BTV


def _prompts(ids_BT: Tensor, opener_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return left-padded ids up to the answer, and segments, which are -1 for padding."""
    width = int(opener_B.max()) + 1
    index_BT = torch.arange(width, device=ids_BT.device) - (width - 1 - opener_B)[:, None]
    segments_BT = torch.where(index_BT < 0, -1, 0)
    return ids_BT.gather(1, index_BT.clamp(min=0)), segments_BT


def _next_input(logits_BV: Tensor, temperature: float, hard: bool) -> Tensor:
    logits = logits_BV.to(at_least_fp32(logits_BV.dtype))
    if hard:
        return F.one_hot(logits.argmax(-1), logits.shape[-1])
    return (logits / temperature).softmax(-1)


MAX_VOCAB_SIZE = 2**14
"""Largest vocabulary, with which 8 rows of 512 tokens take about a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class EAVI(ObjectiveConfigBase):
    """Learn answers after prefixes of the truth and of the policy's own answer."""

    kind: Literal["eavi"] = "eavi"
    data_format: ClassVar[FormatName] = "answers"
    generates: ClassVar[bool] = True
    excursion: Literal["soft", "hard"] = "soft"
    """Whether the policy continues with distributions or with its most likely tokens."""
    temperature: float = 1.0
    """Temperature of soft excursions."""
    alignment_weight: float = 0.5
    """lambda: the weight of alignment; 0 is teacher forcing."""

    def __post_init__(self) -> None:
        if not 0 <= self.alignment_weight <= 1:
            raise ValueError(f"alignment_weight={self.alignment_weight} must be from 0 to 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be a number above 0")

    def build(self) -> "EAVIObjective":
        """Build the objective."""
        return EAVIObjective(self)


class EAVIObjective(Objective):
    """The objective of `EAVI`, which has no state and draws no random number."""

    def __init__(self, config: EAVI):
        super().__init__()
        self.config = config
        self.grids = False

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Detect whether answers are grids; UserError if the vocabulary is too large."""
        if tokenizer.vocab_size > MAX_VOCAB_SIZE:
            size, limit = f"{tokenizer.vocab_size:,} ids", f"{MAX_VOCAB_SIZE:,}"
            raise UserError(
                f"objective.kind=eavi: {size} are too many: positions hold a number for each id,"
                f" at most {limit}; use kd or sft"
            )
        self.grids = is_grid_tokenizer(tokenizer)

    def units(self, batch: Batch) -> Tensor:
        """Count the targets."""
        return batch.mask.sum().to(torch.float32)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """Generate an excursion, then run one forward pass over both kinds of rows."""
        span = last_answer_span(batch.mask)
        excursion_BSV = excursion(
            policy,
            batch.ids,
            span,
            temperature=self.config.temperature,
            hard=self.config.excursion == "hard",
        )
        return self.loss_given_excursion(policy, batch, span, excursion_BSV)

    def loss_given_excursion(
        self, policy: LM, batch: Batch, span: AnswerSpan, excursion_BSV: Tensor
    ) -> Loss:
        """Return the loss for an excursion `excursion_BSV`, which is a constant."""
        answer_BT = span.target_mask(batch.mask)
        true_BTV = excursion_BSV.new_zeros(*batch.ids.shape, excursion_BSV.shape[2])
        true_BTV.scatter_(2, batch.ids[..., None], 1.0)
        inputs_BTV = torch.cat((true_BTV, splice_excursion(true_BTV, span, excursion_BSV)))
        out = policy(
            inputs_BTV, _repeat_rows(batch.positions), _repeat_rows(batch.segments), logits=False
        )
        align_weights_BT = self.config.alignment_weight * answer_BT.to(excursion_BSV.dtype)
        weights = torch.cat(
            (batch.mask.to(align_weights_BT.dtype) - align_weights_BT, align_weights_BT)
        )
        total = summed_nll(out.hidden, _repeat_rows(batch.targets), weights, policy.head)
        count = self.units(batch)
        metrics = {"loss": Metric(total.detach(), count)}
        metrics |= self._answer_metrics(policy, batch, answer_BT, out.hidden.detach())
        metrics |= aux_metrics(out.losses, count)
        return Loss(add_aux_losses(total, out.losses, count), metrics, out.stats, out.grad_probes)

    @torch.no_grad()
    def _answer_metrics(
        self, policy: LM, batch: Batch, answer_BT: Tensor, hidden: Tensor
    ) -> dict[str, Metric]:
        """Return both parts of the answer's loss, and alignment of answers shaped as
        their inputs.
        """
        targets, count = batch.targets[answer_BT], answer_BT.sum()
        teacher_forced, aligned = (
            token_nll(half[answer_BT], targets, policy.head) for half in hidden.chunk(2)
        )
        metrics = {
            "teacher_forcing_loss": Metric(teacher_forced.sum(), count),
            "alignment_loss": Metric(aligned.sum(), count),
        }
        if self.grids:
            equal_shape = self._has_input_shape(batch, answer_BT)[:, None].expand_as(answer_BT)[
                answer_BT
            ]
            metrics["alignment_loss_equal_shape"] = Metric(
                aligned[equal_shape].sum(), equal_shape.sum()
            )
        return metrics

    def _has_input_shape(self, batch: Batch, answer_BT: Tensor) -> Tensor:
        """Return (B,) bool: which answers have the shape of their input."""
        is_equal = []
        for ids, answer in zip(batch.ids.tolist(), answer_BT.tolist(), strict=True):
            start, count = answer.index(True) + 1, sum(answer)
            is_equal.append(answer_has_input_shape(ids, start, start + count))
        return torch.tensor(is_equal, device=answer_BT.device)


def _repeat_rows(rows: Tensor) -> Tensor:
    return torch.cat((rows, rows))
