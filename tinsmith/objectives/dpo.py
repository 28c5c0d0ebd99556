"""Direct preference optimisation and its family: learn from pairs of answers, one preferred.

    reward(answer) = beta (log policy(answer) - log reference(answer))
    loss of a pair = -log sigmoid(reward(chosen) - reward(rejected))

Rafailov et al., 2305.18290, equation 7. Log-probabilities are sums over the answer's tokens, as in
the paper; `normalise: length` divides each by its answer's tokens, which is another objective: its
reward is one per token, and its gradient smaller by the length, so that it wants a larger beta.

Policy and reference read the same batch in the same precision, and neither has dropout or router
noise (`still.py`), so a policy that is its reference has exactly ln 2 to pay.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tinsmith.data.batch import Batch
from tinsmith.data.config import Shape
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    aux_metrics,
    with_aux,
)
from tinsmith.objectives.logprobs import chosen_logprobs, row_sums
from tinsmith.objectives.preferences import Judged, ipo_loss, kto_loss, orpo_loss, simpo_loss
from tinsmith.objectives.reference import reference
from tinsmith.objectives.still import check_still
from tinsmith.text.tokenizer import Tokenizer

_WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True)
class DPO(ObjectiveConfigBase):
    """Make the chosen answers of pairs likelier than the rejected ones."""

    kind: Literal["dpo"] = "dpo"
    shape: ClassVar[Shape] = "pairs"
    still: ClassVar[bool] = True
    loss: Literal["sigmoid", "ipo", "simpo", "orpo", "kto"] = "sigmoid"
    """`sigmoid` is DPO; `simpo` and `orpo` want no reference and are means over tokens; `kto`
    weighs both sides by themselves."""
    beta: float = 0.1
    """How strongly a difference of log-probabilities counts; of `orpo`, the weight of the odds."""
    gamma: float | None = None
    """The margin that `simpo` asks for; 0.5 if nothing is said."""
    label_smoothing: float = 0.0
    """The share of pairs that are taken to be the wrong way round; `sigmoid` alone has it."""
    normalise: Literal["sum", "length"] = "sum"
    """`length` divides log-probabilities by the answer's tokens."""
    reference: str | None = None
    """The folder of the reference model; by default the policy as it stands before the first
    step."""

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be from 0 to below 0.5")
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is for loss=sigmoid, not for loss={self.loss}")
        if self.gamma is not None and self.loss != "simpo":
            raise ValueError(f"gamma is for loss=simpo, not for loss={self.loss}")
        if self.loss in _WITHOUT_REFERENCE and self.reference is not None:
            raise ValueError(f"loss={self.loss} wants no reference; leave it out")
        if self.loss in _WITHOUT_REFERENCE and self.normalise == "length":
            raise ValueError(f"loss={self.loss} is a mean over tokens anyway; leave normalise out")

    def judges(self) -> dict[str, str | None]:
        """The reference, for the losses that want one."""
        return {} if self.loss in _WITHOUT_REFERENCE else {"reference": self.reference}

    def build(self) -> "Preference":
        """The objective."""
        return Preference(self)


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Judged:
    """Per pair (B,): -log sigmoid(margin), chosen_reward, rejected_reward; rewards are detached.

    Log-probabilities (B,) are sums over an answer's tokens, in nats; margin = chosen_reward -
    rejected_reward, reward = beta (policy - reference). 2305.18290, equation 7. With
    `label_smoothing` e, (1 - e) times that plus e times the loss of the sides exchanged (Mitchell,
    "A note on DPO with noisy preferences", 2023).
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    margin = chosen - rejected
    loss = -logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margin)
    return loss, chosen.detach(), rejected.detach()


class Sides(NamedTuple):
    """One model's view of B pairs, each (B,): summed log-probabilities, and how many tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def means(self) -> "Sides":
        """The same with log-probabilities per token."""
        chosen, rejected = self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens
        return self._replace(chosen=chosen, rejected=rejected)


class Preference(Objective):
    """sum over pairs of their loss; the unit is a pair. Rows of a batch come as pairs: chosen,
    rejected, chosen, rejected, ...
    """

    drift: Tensor

    def __init__(self, config: DPO):
        super().__init__()
        self.config = config
        self.register_buffer("drift", torch.zeros((), dtype=torch.float64))

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """The policy must be still."""
        check_still(policy)

    def weight(self, batch: Batch) -> Tensor:
        """Pairs."""
        return torch.tensor(len(batch.ids) // 2, device=batch.ids.device)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """One forward pass over both sides, and one of the reference."""
        said, out = sides(policy, batch)
        loss, chosen, rejected = self._judge(policy, said, batch)
        pairs, margin = self.weight(batch), chosen - rejected
        values = {
            "loss": loss,
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": said.chosen,
            "rejected_logprob": said.rejected,
        }
        if self.config.loss == "kto":
            values["drift"] = (chosen + rejected) / (2 * self.config.beta)
        metrics = {key: Metric(value.detach().sum(), pairs) for key, value in values.items()}
        total = with_aux(loss.sum(), out.losses, pairs)
        return Loss(total, metrics | aux_metrics(out.losses, pairs), out.stats, out.probes)

    def accept(self, means: dict[str, float]) -> bool:
        """KTO measures the drift of the policy over the whole batch of a step, for the next step,
        so that no loss depends on what else is in its micro-batch.
        """
        if self.config.loss == "kto":
            self.drift.fill_(max(0.0, means["drift"]))
        return True

    def _judge(self, policy: LM, said: Sides, batch: Batch) -> Judged:
        beta = self.config.beta
        if self.config.loss == "simpo":
            gamma = 0.5 if self.config.gamma is None else self.config.gamma
            return simpo_loss(*said.means()[:2], beta, gamma)
        if self.config.loss == "orpo":
            return orpo_loss(*said.means()[:2], beta)
        with reference(policy, self.frozen.get("reference")) as lm:
            known, _ = sides(lm, batch)
        if self.config.normalise == "length":
            said, known = said.means(), known.means()
        if self.config.loss == "ipo":
            return ipo_loss(*said[:2], *known[:2], beta)
        if self.config.loss == "kto":
            return kto_loss(*said[:2], *known[:2], beta, self.drift.to(said.chosen))
        return dpo_loss(*said[:2], *known[:2], beta, self.config.label_smoothing)


def sides(lm: LM, batch: Batch) -> tuple[Sides, ModelOut]:
    """What a model makes of both sides of a batch's pairs, in one forward pass."""
    assert len(batch.ids) % 2 == 0, "a batch of pairs has two rows for each"
    out = lm(batch.ids, batch.positions, batch.segments, logits=False)
    logprobs = chosen_logprobs(out.hidden, batch.targets, batch.mask, lm.head)
    sums, tokens = row_sums(logprobs, batch.mask), batch.mask.sum(1)
    return Sides(sums[0::2], sums[1::2], tokens[0::2], tokens[1::2]), out
