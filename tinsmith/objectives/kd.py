"""Knowledge distillation: a student learns what a frozen teacher says of every next token.

    loss = (1 - hard) tau^2 D(teacher, student) + hard * cross-entropy of the label

summed over the targets that count (Hinton et al., 1503.02531). The divergence D is the forward KL,
the reverse KL or something between them (`divergence.py`); its gradient shrinks with 1 / tau^2, so
tau^2 keeps the mix with labels what it is at every temperature. The teacher may be of another size
and kind, not of another vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinsmith.data.formats import FormatName
from tinsmith.data.loader.batch import Batch
from tinsmith.losses.divergence import (
    DistillWeights,
    HeadInputs,
    summed_divergence,
    token_divergence,
)
from tinsmith.nn.model import LM
from tinsmith.nn.quant import WeightDtype
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


def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float
) -> Tensor:
    """tau^2 KL(teacher || student), a scalar in at least float32, in nats: the mean over masked
    positions.

    Logits (B, T, V), `mask` (B, T) bool, or weights of a weighted mean. Only the student gets a
    gradient, masked positions exactly zero; no positions at all give 0. ValueError where the shapes
    differ or the temperature is not above 0.
    """
    return temperature**2 * generalized_jsd(student_logits, teacher_logits, mask, 0.0, temperature)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, beta: float, temperature: float
) -> Tensor:
    """The generalised Jensen-Shannon divergence (2306.13649, equation 1) with trl's beta: 0 is
    KL(teacher || student), 1 is KL(student || teacher). Without tau^2; all else as in `kd_loss`.
    """
    check_divergence(beta, temperature)
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits of student and teacher must be of one shape; they are {shapes}")
    chosen = mask != 0
    each = token_divergence(student_logits[chosen], teacher_logits[chosen], beta, temperature)
    weights = mask[chosen].to(each.dtype)
    total = weights.sum()
    return (each * weights).sum() / total.where(total > 0, 1)


def check_divergence(beta: float, temperature: float) -> None:
    """Raise ValueError for numbers that make no divergence."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be from 0 to 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class KD(ObjectiveConfigBase):
    """Say what a teacher says."""

    kind: Literal["kd"] = "kd"
    teacher: str
    """A run, a checkpoint or a Hugging Face folder of the same vocabulary."""
    teacher_weights: WeightDtype = "fp32"
    """How the teacher's weights are held in memory."""
    reads: Literal["documents", "chats"] = "chats"
    loss: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float | None = None
    """Of `jsd`, between 0 (forward) and 1 (reverse); by default 0.5."""
    temperature: float = 1.0
    ce_weight: float = 0.0
    """The share of the labels' cross-entropy."""
    weights: TagWeights = TagWeights()

    def __post_init__(self) -> None:
        check_divergence(self.distill_weights.beta, self.temperature)
        if self.beta is not None and (self.loss != "jsd" or self.beta in (0, 1)):
            raise ValueError(
                f"beta={self.beta} must be above 0 and below 1, with loss: jsd; loss: forward and "
                "loss: reverse have none"
            )
        if not 0 <= self.ce_weight < 1:
            raise ValueError(
                f"ce_weight={self.ce_weight} must be at least 0 and below 1; sft is labels only"
            )

    @property
    def data_format(self) -> FormatName:
        """What it reads."""
        return self.reads

    @property
    def distill_weights(self) -> DistillWeights:
        """The loss of one token."""
        between = 0.5 if self.beta is None else self.beta
        beta = {"forward": 0.0, "reverse": 1.0, "jsd": between}[self.loss]
        return DistillWeights(beta, self.temperature, self.temperature**2, self.ce_weight)

    def frozen_models(self) -> dict[str, str | None]:
        """Name the teacher model."""
        return {"teacher": self.teacher}

    def frozen_weight_dtype(self) -> WeightDtype:
        """How the teacher's weights are held."""
        return self.teacher_weights

    def build(self) -> "Distillation":
        """Build the objective."""
        return Distillation(self)


class Distillation(Objective):
    """sum over the batch's targets of weight * loss; the unit is a target's weight."""

    def __init__(self, config: KD):
        super().__init__()
        self.distill_weights, self.token_weights = (
            config.distill_weights,
            TokenWeights(config.weights),
        )

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Look up the tags' ids."""
        self.token_weights.prepare(tokenizer)

    def units(self, batch: Batch) -> Tensor:
        """The sum of the targets' weights."""
        return self.token_weights(batch).sum()

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """The teacher's forward pass without gradients, the student's with them."""
        weights = self.token_weights(batch)
        chosen = weights != 0
        teacher = self.frozen_models["teacher"]
        with torch.no_grad():
            taught = teacher(batch.ids, batch.positions, batch.segments, logits=False).hidden
        out = policy(batch.ids, batch.positions, batch.segments, logits=False)
        total, seen = summed_divergence(
            HeadInputs(out.hidden[chosen], policy.head.weight),
            HeadInputs(taught[chosen], teacher.head.weight),
            batch.targets[chosen],
            weights[chosen],
            self.distill_weights,
        )
        units = weights.sum()
        metrics = {
            "loss": Metric(total.detach(), units),
            "divergence": Metric(seen[0], units),
            "nll": Metric(seen[1], units),
        }
        total = add_aux_losses(total, out.losses, units)
        return Loss(total, metrics | aux_metrics(out.losses, units), out.stats, out.grad_probes)
