"""Direct preference optimisation (DPO) and related losses on pairs of completions.

    reward(completion) = beta (log policy(completion) - log reference(completion))
    loss of a pair = -log sigmoid(reward(chosen) - reward(rejected))

Rafailov et al., 2305.18290, equation 7. Log-probabilities are sums over the completion's tokens, as
in the paper; `normalise: length` divides each by its completion's number of tokens, which is
another objective: the reward is per token, and the gradient is smaller by the length, so beta must
be larger.

Policy and reference read the same batch in the same precision, without dropout and router noise
(`objectives.frozen`), so the loss is exactly ln 2 if the policy equals the reference.
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
    """Increase the likelihood of chosen completions relative to rejected ones."""

    kind: Literal["dpo"] = "dpo"
    data_format: ClassVar[FormatName] = "pairs"
    finetune_lr: ClassVar[float] = 1e-6
    deterministic: ClassVar[bool] = True
    loss: Literal["sigmoid", "ipo", "simpo", "orpo", "kto"] = "sigmoid"
    """`sigmoid` is DPO; `simpo` and `orpo` have no reference and use means over tokens; `kto` has a
    separate term for each side. Its reference point is the mean log-ratio of the completions of the
    step before; that of the paper and of TRL comes from mismatched prompts of the same batch.
    """
    beta: float = 0.1
    """Scale of log-probability differences; for `orpo`, the weight of the odds-ratio term."""
    gamma: float | None = None
    """Target margin of `simpo`; null: 0.5."""
    label_smoothing: float = 0.0
    """Assumed fraction of pairs with exchanged labels; only for `sigmoid`."""
    normalise: Literal["sum", "length"] = "sum"
    """`length` divides log-probabilities by the completion's number of tokens."""
    reference: str | None = None
    """Folder of the reference model; null: the policy before the first step."""
    router_losses: bool = False
    """If True, the load-balancing losses of routers are trained on, as in pretraining."""

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
            raise ValueError(f"loss={self.loss} has no reference; leave it out")
        if self.loss in _WITHOUT_REFERENCE and self.normalise == "length":
            raise ValueError(f"loss={self.loss} is a mean over tokens anyway; leave normalise out")

    def trains_router_losses(self) -> bool:
        """Return the key `router_losses`."""
        return self.router_losses

    def frozen_models(self) -> dict[str, str | None]:
        """Return the reference model, for losses that have one."""
        return {} if self.loss in _WITHOUT_REFERENCE else {"reference": self.reference}

    def build(self) -> "PreferenceObjective":
        """Build the objective."""
        return PreferenceObjective(self)


class PairLogprobs(NamedTuple):
    """Summed log-probabilities of B pairs under one model, and numbers of tokens, each (B,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    def per_token(self) -> "PairLogprobs":
        """Return the log-probabilities divided by the numbers of tokens."""
        chosen, rejected = self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens
        return self._replace(chosen=chosen, rejected=rejected)


class PreferenceObjective(Objective):
    """The sum over pairs of a preference loss; the unit is a pair.

    The rows of a batch alternate: chosen, rejected, chosen, rejected, ...
    """

    drift: Tensor

    def __init__(self, config: DPO):
        super().__init__()
        self.config = config
        self.register_buffer("drift", torch.zeros((), dtype=torch.float64))

    def prepare(self, policy: LM, tokenizer: Tokenizer) -> None:
        """Check that the policy has no dropout and no router noise."""
        check_deterministic(policy)

    def units(self, batch: Batch) -> Tensor:
        """Count the pairs of the batch."""
        return torch.tensor(len(batch.ids) // 2, device=batch.ids.device)

    def loss(self, policy: LM, batch: Batch) -> Loss:
        """Run one forward pass over both sides, and one of the reference."""
        logprobs, out = pair_logprobs(policy, batch)
        loss, chosen, rejected = self._loss_and_rewards(policy, logprobs, batch)
        pairs, margin = self.units(batch), chosen - rejected
        values = {
            "loss": loss,
            "margin": margin,
            "accuracy": (margin > 0).float(),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "chosen_logprob": logprobs.chosen,
            "rejected_logprob": logprobs.rejected,
        }
        if self.config.loss == "kto":
            values["drift"] = (chosen + rejected) / (2 * self.config.beta)
        metrics = {key: Metric(value.detach().sum(), pairs) for key, value in values.items()}
        total = add_aux_losses(loss.sum(), out.losses, pairs)
        return Loss(total, metrics | aux_metrics(out.losses, pairs), out.stats, out.grad_probes)

    def accept_step(self, means: dict[str, float]) -> bool:
        """Set KTO's drift for the next step to that of the policy over the whole batch of this
        step.

        So a loss does not depend on the other pairs in its micro-batch.
        """
        if self.config.loss == "kto":
            self.drift.fill_(max(0.0, means["drift"]))
        return True

    def _loss_and_rewards(
        self, policy: LM, policy_logprobs: PairLogprobs, batch: Batch
    ) -> LossAndRewards:
        beta = self.config.beta
        if self.config.loss == "simpo":
            gamma = 0.5 if self.config.gamma is None else self.config.gamma
            return simpo_loss(*policy_logprobs.per_token()[:2], beta, gamma)
        if self.config.loss == "orpo":
            return orpo_loss(*policy_logprobs.per_token()[:2], beta)
        with reference_model(policy, self.frozen_models.get("reference")) as lm:
            reference_logprobs, _ = pair_logprobs(lm, batch)
        if self.config.normalise == "length":
            policy_logprobs, reference_logprobs = (
                policy_logprobs.per_token(),
                reference_logprobs.per_token(),
            )
        if self.config.loss == "ipo":
            return ipo_loss(*policy_logprobs[:2], *reference_logprobs[:2], beta)
        if self.config.loss == "kto":
            return kto_loss(
                *policy_logprobs[:2],
                *reference_logprobs[:2],
                beta,
                self.drift.to(policy_logprobs.chosen),
            )
        return dpo_loss(
            *policy_logprobs[:2], *reference_logprobs[:2], beta, self.config.label_smoothing
        )


def pair_logprobs(lm: LM, batch: Batch) -> tuple[PairLogprobs, ModelOut]:
    """Compute the log-probabilities of both sides of all pairs in one forward pass."""
    assert len(batch.ids) % 2 == 0, "a batch of pairs has two rows for each"
    out = lm(batch.ids, batch.positions, batch.segments, logits=False)
    logprobs = target_logprobs(out.hidden, batch.targets, batch.mask, lm.head)
    sums, num_tokens = row_sums(logprobs, batch.mask), batch.mask.sum(1)
    return PairLogprobs(sums[0::2], sums[1::2], num_tokens[0::2], num_tokens[1::2]), out
