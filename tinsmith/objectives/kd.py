"""Knowledge distillation (KD): a student learns the next-token distributions of a frozen teacher.

    loss = (1 - ce_weight) tau^2 D(teacher, student) + ce_weight * cross-entropy of the label

summed over the targets with mask 1 (Hinton et al., 1503.02531). The divergence D is the forward KL,
the reverse KL or a generalised JSD (`losses.divergence`); its gradient shrinks with 1 / tau^2, so
the factor tau^2 keeps the balance with labels the same at every temperature. The teacher may have
another size and architecture, but must have the same vocabulary.
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
    """Return tau^2 KL(teacher || student), the mean over masked-in positions, in nats.

    A scalar in at least float32. Logits (B, T, V), `mask` (B, T) bool, or weights of a weighted
    mean. Only the student gets a gradient, exactly zero where the mask is 0; without positions the
    loss is 0. ValueError if the shapes differ or the temperature is not above 0.
    """
    return temperature**2 * generalized_jsd(student_logits, teacher_logits, mask, 0.0, temperature)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, beta: float, temperature: float
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence (2306.13649, equation 1) with TRL's beta.

    beta 0 is KL(teacher || student), beta 1 is KL(student || teacher). Without tau^2; all else as
    in `kd_loss`.
    """
    check_divergence(beta, temperature)
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        raise ValueError(f"logits of student and teacher must be of one shape; they are {shapes}")
    selected = mask != 0
    divergence = token_divergence(
        student_logits[selected], teacher_logits[selected], beta, temperature
    )
    weights = mask[selected].to(divergence.dtype)
    total = weights.sum()
    return (divergence * weights).sum() / total.where(total > 0, 1)


def check_divergence(beta: float, temperature: float) -> None:
    """Raise ValueError for an invalid beta or temperature."""
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta} must be from 0 to 1")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a number above 0")


@dataclass(frozen=True, kw_only=True)
class KD(ObjectiveConfigBase):
    """Learn the next-token distributions of a teacher."""

    kind: Literal["kd"] = "kd"
    teacher: str
    """A run, a checkpoint or a Hugging Face folder of the same vocabulary."""
    teacher_weights: WeightDtype = "fp32"
    """Storage of the teacher's weights in memory."""
    reads: Literal["documents", "chats"] = "chats"
    loss: Literal["forward", "reverse", "jsd"] = "forward"
    beta: float | None = None
    """For `jsd`, between 0 (forward) and 1 (reverse); null: 0.5."""
    temperature: float = 1.0
    ce_weight: float = 0.0
    """Weight of the cross-entropy of labels."""
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
                f"ce_weight={self.ce_weight} must be at least 0 and below 1; for 1 use sft"
            )

    @property
    def data_format(self) -> FormatName:
        """The data format that `reads` selects."""
        return self.reads

    @property
    def distill_weights(self) -> DistillWeights:
        """The weights of the loss of one token."""
        jsd_beta = 0.5 if self.beta is None else self.beta
        beta = {"forward": 0.0, "reverse": 1.0, "jsd": jsd_beta}[self.loss]
        return DistillWeights(beta, self.temperature, self.temperature**2, self.ce_weight)

    def frozen_models(self) -> dict[str, str | None]:
        """Return the path of the teacher model."""
        return {"teacher": self.teacher}

    def frozen_weight_dtype(self) -> WeightDtype:
        """Return the storage of the teacher's weights."""
        return self.teacher_weights

    def build(self) -> "Distillation":
        """Build the objective."""
        return Distillation(self)


class Distillation(Objective):
    """The sum over targets of weight * loss; the unit is a target's weight."""

    def __init__(self, config: KD):
        super().__init__()
        self.distill_weights, self.token_weights = (
            config.distill_weights,
            TokenWeights(config.weights),
        )

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Look up the token ids of tags."""
        self.token_weights.prepare(tokenizer)

    def units(self, batch: Batch) -> Tensor:
        """Return the sum of the targets' weights."""
        return self.token_weights(batch).sum()

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """Run the teacher without gradients and the student with them."""
        weights = self.token_weights(batch)
        selected = weights != 0
        teacher = self.frozen_models["teacher"]
        with torch.no_grad():
            teacher_hidden = teacher(
                batch.ids, batch.positions, batch.segments, logits=False
            ).hidden
        out = policy(batch.ids, batch.positions, batch.segments, logits=False)
        total, term_sums = summed_divergence(
            HeadInputs(out.hidden[selected], policy.head.weight),
            HeadInputs(teacher_hidden[selected], teacher.head.weight),
            batch.targets[selected],
            weights[selected],
            self.distill_weights,
        )
        units = weights.sum()
        metrics = {
            "loss": Metric(total.detach(), units),
            "divergence": Metric(term_sums[0], units),
            "nll": Metric(term_sums[1], units),
        }
        total = add_aux_losses(total, out.losses, units)
        return Loss(total, metrics | aux_metrics(out.losses, units), out.stats, out.grad_probes)
