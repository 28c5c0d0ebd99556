"""Group-relative policy optimisation (GRPO, 2402.03300).

    A_i  = (R_i - mean R) / (std R + 1e-4), over the completions of one prompt
    loss = policy loss(A) + kl_coef * KL(pi to the reference)

Dr. GRPO (2503.20783) does not divide by the deviation, because that favours prompts that are nearly
always or nearly never solved.

`losses.policy` has the policy losses: grpo, dapo, dr_grpo, cispo, gspo. The estimator k3 of the KL
divergence, as a loss, is the forward KL.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Count
from tinsmith.data.formats.prompts import Prompt
from tinsmith.losses.logprobs import KLLossEstimator
from tinsmith.losses.policy import (
    DAPOLoss,
    GRPOLoss,
    PolicyLoss,
    expand_advantages,
    kl_penalty,
)
from tinsmith.nn.model import LM
from tinsmith.objectives.base import Loss, Metric, add_aux_losses, aux_metrics
from tinsmith.objectives.rl.advantages import (
    fill_missing_rewards,
    group_advantages,
    zero_variance_groups,
)
from tinsmith.objectives.rl.base import RLConfig, RLObjective
from tinsmith.objectives.rl.metrics import rollout_metrics
from tinsmith.objectives.rl.rollout import RolloutBatch


@dataclass(frozen=True, kw_only=True)
class CriticFreeConfig(RLConfig):
    """Keys that `GRPO` and `SPO` share. The two differ in how they compute advantages."""

    loss: PolicyLoss = DAPOLoss()
    kl_estimator: KLLossEstimator = "k3"
    """Estimator of the KL divergence in the loss: `k3` as in the paper, or `k2`, whose gradient is
    that of the divergence of the policy from the reference.
    """


@dataclass(frozen=True, kw_only=True)
class GRPO(CriticFreeConfig):
    """Several completions per prompt, each compared with the mean reward of its group."""

    kind: Literal["grpo"] = "grpo"
    loss: PolicyLoss = GRPOLoss()
    num_generations: Count = 8
    scale_rewards: bool | None = None
    """If True, advantages are divided by the standard deviation of their group. None: as the paper
    of the loss does, which is False for `dr_grpo` and True otherwise.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} must be at least 2, to compare them"
            )

    def build(self) -> "GRPOObjective":
        """Build the objective."""
        return GRPOObjective(self)


class CriticFreeObjective(RLObjective):
    """Policy loss without a value model, in one forward pass."""

    def __init__(self, config: CriticFreeConfig):
        super().__init__(config)
        self.config = config

    def units(self, batch: RolloutBatch) -> Tensor:
        """Count the units of the policy loss: tokens, rows, or rows times the largest length."""
        return self.config.loss.units(batch.mask, self.config.max_response_tokens)

    def loss(self, policy: LM, batch: RolloutBatch) -> Loss:
        """Compute the policy loss and the KL penalty, summed over units."""
        config, count = self.config, self.units(batch)
        logprobs, out = self.logprobs(policy, batch)
        log_ratio = config.loss.log_ratio(logprobs, batch.old_logprobs, batch.mask)
        per_token = config.loss.per_token(log_ratio, batch.advantages, logprobs, batch.mask)
        if config.kl_coef:
            penalty = kl_penalty(logprobs, batch.ref_logprobs, batch.mask, config.kl_estimator)
            per_token = per_token + config.kl_coef * penalty
        total = config.loss.sum(per_token, batch.mask)
        metrics = {"loss": Metric(total.detach(), count)} | self.rollout_metrics(batch, logprobs)
        metrics |= aux_metrics(out.losses, count)
        return Loss(add_aux_losses(total, out.losses, count), metrics, out.stats, out.grad_probes)

    def rollout_metrics(self, rows: RolloutBatch, logprobs: Tensor) -> dict[str, Metric]:
        """Return the metrics of a minibatch, the clip fraction of the policy loss included."""
        loss = self.config.loss
        log_ratio = loss.log_ratio(logprobs.detach(), rows.old_logprobs, rows.mask)
        clipped = loss.is_clipped(log_ratio, rows.advantages, rows.mask)
        return rollout_metrics(self.config, rows, logprobs, clipped)


class GRPOObjective(CriticFreeObjective):
    """Advantages are relative to the group: the completions of one prompt."""

    def __init__(self, config: GRPO):
        super().__init__(config)
        self.config = config

    def compute_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """Normalise rewards within groups. A missing reward counts as the mean of its group."""
        groups = fill_missing_rewards(rows.rewards.view(-1, self.config.num_generations))
        scale = self.config.scale_rewards
        scale = self.config.loss.SCALES_REWARDS if scale is None else scale
        advantages = group_advantages(groups, scale=scale).flatten()
        return rows._replace(advantages=expand_advantages(advantages, rows.mask))

    def rollout_metrics(self, rows: RolloutBatch, logprobs: Tensor) -> dict[str, Metric]:
        """Add the fraction of groups whose rewards are all equal, so that they have no gradient."""
        same = zero_variance_groups(
            fill_missing_rewards(rows.rewards.view(-1, self.config.num_generations))
        )
        count = torch.tensor(len(same), device=same.device)
        return super().rollout_metrics(rows, logprobs) | {
            "zero_variance_groups": Metric(same.sum(), count)
        }
