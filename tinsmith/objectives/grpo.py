"""Group-relative policy optimisation, and what has been made of its loss since.

A_i = (R_i - mean R) / (std R + 1e-4), over the answers to one prompt
grpo     mean over rows of the mean over a row's tokens (2402.03300)
dapo     mean over all tokens (2503.14476)
dr_grpo  sum / (rows * max_length), which favours no length (2503.20783)
cispo    -sg(min(ratio, 1 + clip_high)) * A * log pi, mean over all tokens (2506.13585)
each + beta * KL(pi to the reference), by the estimator k3, which as a loss is the forward KL
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinsmith.core.parse import Count
from tinsmith.data.prompts import Prompt
from tinsmith.losses.logprobs import KLLossEstimator
from tinsmith.losses.policy import (
    LossName,
    expand_advantages,
    sum_over_units,
    token_loss,
    units,
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
    """What `GRPO` and `SPO` can be told beside; they differ in how they come by advantages."""

    loss: LossName = "dapo"
    kl_estimator: KLLossEstimator = "k3"
    """Of the KL divergence in the loss: `k3` as in the paper, or `k2`, whose gradient is that of
    the divergence of the policy from the reference.
    """


@dataclass(frozen=True, kw_only=True)
class GRPO(CriticFreeConfig):
    """Several answers to each prompt, each judged against the others."""

    kind: Literal["grpo"] = "grpo"
    loss: LossName = "grpo"
    num_generations: Count = 8

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
    """The loss of one forward pass over prompts and answers."""

    def __init__(self, config: CriticFreeConfig):
        super().__init__(config)
        self.config = config

    def units(self, batch: RolloutBatch) -> Tensor:
        """Tokens, rows, or rows times the longest answer, by the name of the loss."""
        return units(batch.mask, self.config.loss, self.config.max_response_tokens)

    def loss(self, policy: LM, batch: RolloutBatch) -> Loss:
        """The sum over the loss's units."""
        config, count = self.config, self.units(batch)
        logprobs, out = self.logprobs(policy, batch)
        each = token_loss(
            logprobs,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantages,
            batch.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_coef=config.kl_coef,
            loss=config.loss,
            kl_estimator=config.kl_estimator,
        )
        total = sum_over_units(each, batch.mask, config.loss)
        metrics = {"loss": Metric(total.detach(), count)} | self.rollout_metrics(batch, logprobs)
        metrics |= aux_metrics(out.losses, count)
        return Loss(add_aux_losses(total, out.losses, count), metrics, out.stats, out.grad_probes)

    def rollout_metrics(self, rows: RolloutBatch, logprobs: Tensor) -> dict[str, Metric]:
        """What is worth knowing."""
        return rollout_metrics(self.config, rows, logprobs)


class GRPOObjective(CriticFreeObjective):
    """Advantages within groups."""

    def with_advantages(
        self, policy: LM, prompts: list[Prompt], rows: RolloutBatch
    ) -> RolloutBatch:
        """An answer without a reward counts as the mean of its group."""
        groups = fill_missing_rewards(rows.rewards.view(-1, self.config.num_generations))
        advantages = group_advantages(groups).flatten()
        return rows._replace(advantages=expand_advantages(advantages, rows.mask))

    def rollout_metrics(self, rows: RolloutBatch, logprobs: Tensor) -> dict[str, Metric]:
        """Also the share of groups that teach nothing."""
        same = zero_variance_groups(
            fill_missing_rewards(rows.rewards.view(-1, self.config.num_generations))
        )
        count = torch.tensor(len(same), device=same.device)
        return super().rollout_metrics(rows, logprobs) | {
            "zero_variance_groups": Metric(same.sum(), count)
        }
