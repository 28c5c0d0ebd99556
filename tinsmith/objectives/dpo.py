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

from tinsmith.data.formats import FormatName
from tinsmith.data.loader.batch import Batch
from tinsmith.losses.logprobs import row_sums, target_logprobs
from tinsmith.losses.preference import (
    LossAndRewards,
    dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
)
from tinsmith.nn.model import LM, ModelOut
from tinsmith.objectives.base import (
    Loss,
    Metric,
    Objective,
    ObjectiveConfigBase,
    add_aux_losses,
    aux_metrics,
)
from tinsmith.objectives.frozen import check_deterministic, reference_model
from tinsmith.text.tokenizer import Tokenizer

_WITHOUT_REFERENCE = ("simpo", "orpo")


@dataclass(frozen=True, kw_only=True)
class DPO(ObjectiveConfigBase):
    """Make the chosen answers of pairs likelier than the rejected ones."""

    kind: Literal["dpo"] = "dpo"
    data_format: ClassVar[FormatName] = "pairs"
    deterministic: ClassVar[bool] = True
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

    def frozen_models(self) -> dict[str, str | None]:
        """The reference, for the losses that want one."""
        return {} if self.loss in _WITHOUT_REFERENCE else {"reference": self.reference}

    def build(self) -> "PreferenceObjective":
        """Build the objective."""
        return PreferenceObjective(self)


class PairLogprobs(NamedTuple):
    """One model's view of B pairs, each (B,): summed log-probabilities, and how many tokens."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> "PairLogprobs":
        """The same with log-probabilities per token."""
        chosen, rejected = self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens
        return self._replace(chosen=chosen, rejected=rejected)


class PreferenceObjective(Objective):
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
        check_deterministic(policy)

    def units(self, batch: Batch) -> Tensor:
        """Count the pairs of the batch."""
        return torch.tensor(len(batch.ids) // 2, device=batch.ids.device)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """One forward pass over both sides, and one of the reference."""
        output, out = pair_logprobs(policy, batch)
        loss, chosen, rejected = self._frozen_model(policy, output, batch)
        pairs, margin = self.units(batch), chosen - rejected
        values = {
            "loss": loss,
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": output.chosen,
            "rejected_logprob": output.rejected,
        }
        if self.config.loss == "kto":
            values["drift"] = (chosen + rejected) / (2 * self.config.beta)
        metrics = {key: Metric(value.detach().sum(), pairs) for key, value in values.items()}
        total = add_aux_losses(loss.sum(), out.losses, pairs)
        return Loss(total, metrics | aux_metrics(out.losses, pairs), out.stats, out.grad_probes)

    def accept_step(self, means: dict[str, float]) -> bool:
        """KTO measures the drift of the policy over the whole batch of a step, for the next step,
        so that no loss depends on what else is in its micro-batch.
        """
        if self.config.loss == "kto":
            self.drift.fill_(max(0.0, means["drift"]))
        return True

    def _frozen_model(self, policy: LM, output: PairLogprobs, batch: Batch) -> LossAndRewards:
        beta = self.config.beta
        if self.config.loss == "simpo":
            gamma = 0.5 if self.config.gamma is None else self.config.gamma
            return simpo_loss(*output.per_token()[:2], beta, gamma)
        if self.config.loss == "orpo":
            return orpo_loss(*output.per_token()[:2], beta)
        with reference_model(policy, self.frozen_models.get("reference")) as lm:
            known, _ = pair_logprobs(lm, batch)
        if self.config.normalise == "length":
            output, known = output.per_token(), known.per_token()
        if self.config.loss == "ipo":
            return ipo_loss(*output[:2], *known[:2], beta)
        if self.config.loss == "kto":
            return kto_loss(*output[:2], *known[:2], beta, self.drift.to(output.chosen))
        return dpo_loss(*output[:2], *known[:2], beta, self.config.label_smoothing)


def pair_logprobs(lm: LM, batch: Batch) -> tuple[PairLogprobs, ModelOut]:
    """What a model makes of both sides of a batch's pairs, in one forward pass."""
    assert len(batch.ids) % 2 == 0, "a batch of pairs has two rows for each"
    out = lm(batch.ids, batch.positions, batch.segments, logits=False)
    logprobs = target_logprobs(out.hidden, batch.targets, batch.mask, lm.head)
    sums, tokens = row_sums(logprobs, batch.mask), batch.mask.sum(1)
    return PairLogprobs(sums[0::2], sums[1::2], tokens[0::2], tokens[1::2]), out
