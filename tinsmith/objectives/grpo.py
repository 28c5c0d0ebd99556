"""Group-relative policy optimisation, and what has been made of its loss since.

A_i = (R_i - mean R) / (std R + 1e-4), over the answers to one prompt
grpo     mean over rows of the mean over a row's tokens (2402.03300)
dapo     mean over all tokens (2503.14476)
dr_grpo  sum / (rows * max_length), which favours no length (2503.20783)
cispo    -sg(min(ratio, 1 + clip_high)) * A * log pi, mean over all tokens (2506.13585)
each + beta * KL(pi to the reference), by the estimator k3, which as a loss is the forward KL
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from tinsmith.core.parse import Count
from tinsmith.data.prompts import Prompt
from tinsmith.nn.model import LM
from tinsmith.objectives.base import Loss, Metric, aux_metrics, with_aux
from tinsmith.objectives.logprobs import LossEstimator, kl
from tinsmith.objectives.online import Online, OnlineObjective
from tinsmith.objectives.outcomes import told
from tinsmith.objectives.ratio import log_ratio, per_token, ratio, surrogate
from tinsmith.objectives.rollout import Rollout

LossName = Literal["grpo", "dapo", "dr_grpo", "cispo"]


def group_advantages(rewards: Tensor) -> Tensor:
    """(P, G) rewards of G answers to each of P prompts -> (P, G) advantages: less the group's mean,
    over its population standard deviation + 1e-4. Equal rewards give exactly 0. Whole rewards are
    taken as torch's default float.
    """
    if not rewards.is_floating_point():
        rewards = rewards.to(torch.get_default_dtype())
    centred = rewards - rewards.mean(1, keepdim=True)
    spread = rewards.std(1, keepdim=True, correction=0) + 1e-4
    return torch.where(degenerate(rewards)[:, None], 0, centred / spread)


def degenerate(rewards: Tensor) -> Tensor:
    """(P,) groups of (P, G) whose rewards are all equal: they teach nothing."""
    return rewards.amax(1) == rewards.amin(1)


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    loss: LossName,
    max_length: int | None = None,
    estimator: LossEstimator = "k3",
) -> Tensor:
    """One scalar. Log-probabilities (B, T) of the sampled tokens, `advantages` (B,) or (B, T),
    `mask` (B, T); the ratio is clipped to [1 - clip_low, 1 + clip_high]. `reference_logprobs` may
    be None where `beta` is 0. `dr_grpo` wants `max_length`, the longest an answer may be.

    Masked positions get exactly zero gradient; no tokens at all give 0. ValueError for an unknown
    `loss`, for `dr_grpo` without `max_length`, and for a `beta` without `reference_logprobs`.
    """
    each = token_loss(
        logprobs,
        old_logprobs,
        reference_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        loss=loss,
        estimator=estimator,
    )
    return summed(each, mask, loss) / units(mask, loss, max_length).clamp(min=1)


def summed(token_losses: Tensor, mask: Tensor, loss: LossName) -> Tensor:
    """The sum over a loss's units: rows for `grpo`, each the mean over its tokens, tokens else."""
    if loss == "grpo":
        return (token_losses.sum(1) / mask.bool().sum(1).clamp(min=1)).sum()
    return token_losses.sum()


def units(mask: Tensor, loss: LossName, max_length: int | None) -> Tensor:
    """How many units the rows hold."""
    if loss == "dr_grpo":
        if max_length is None:
            raise ValueError("loss=dr_grpo wants max_length, the longest an answer may be")
        return torch.tensor(len(mask) * max_length)
    return torch.tensor(len(mask)) if loss == "grpo" else mask.bool().sum()


def token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    loss: LossName,
    estimator: LossEstimator = "k3",
) -> Tensor:
    """The loss (B, T) of every token, 0 where masked. ValueError as in `grpo_loss`."""
    if loss not in get_args(LossName):
        raise ValueError(f"loss={loss} must be grpo, dapo, dr_grpo or cispo")
    if loss == "cispo":
        held = ratio(logprobs, old_logprobs, mask).clamp(max=1 + clip_high).detach()
        each = -held * per_token(advantages, mask) * torch.where(mask.bool(), logprobs, 0)
    else:
        each = surrogate(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    if beta == 0:
        return each
    if reference_logprobs is None:
        raise ValueError(f"beta={beta} wants reference_logprobs, which are None")
    # the difference is all that an estimator looks at
    away = log_ratio(logprobs, reference_logprobs, mask)
    return each + beta * kl(away, torch.zeros_like(away), estimator)


@dataclass(frozen=True, kw_only=True)
class Clipped(Online):
    """What `GRPO` and `SPO` can be told beside; they differ in how they come by advantages."""

    loss: LossName = "dapo"
    estimator: LossEstimator = "k3"
    """Of the KL divergence in the loss: `k3` as in the paper, or `k2`, whose gradient is that of
    the divergence of the policy from the reference.
    """


@dataclass(frozen=True, kw_only=True)
class GRPO(Clipped):
    """Several answers to each prompt, each judged against the others."""

    kind: Literal["grpo"] = "grpo"
    loss: LossName = "grpo"
    answers: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.answers < 2:
            raise ValueError(f"answers={self.answers} must be at least 2, to compare them")

    def build(self) -> "GroupRelative":
        """The objective."""
        return GroupRelative(self)


class ClippedPolicy(OnlineObjective):
    """The loss of one forward pass over prompts and answers."""

    def __init__(self, config: Clipped):
        super().__init__(config)
        self.config = config

    def weight(self, batch: Rollout) -> Tensor:
        """Tokens, rows, or rows times the longest answer, by the name of the loss."""
        return units(batch.mask, self.config.loss, self.config.longest)

    def loss(self, policy: LM, batch: Rollout) -> Loss:
        """The sum over the loss's units."""
        config, count = self.config, self.weight(batch)
        logprobs, out = self.logprobs(policy, batch)
        each = token_loss(
            logprobs,
            batch.old,
            batch.reference,
            batch.advantages,
            batch.mask,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            beta=config.beta,
            loss=config.loss,
            estimator=config.estimator,
        )
        total = summed(each, batch.mask, config.loss)
        metrics = {"loss": Metric(total.detach(), count)} | self.told(batch, logprobs)
        metrics |= aux_metrics(out.losses, count)
        return Loss(with_aux(total, out.losses, count), metrics, out.stats, out.probes)

    def told(self, rows: Rollout, logprobs: Tensor) -> dict[str, Metric]:
        """What is worth knowing."""
        return told(self.config, rows, logprobs)


class GroupRelative(ClippedPolicy):
    """Advantages within groups."""

    def judged(self, policy: LM, prompts: list[Prompt], rows: Rollout) -> Rollout:
        """An answer without a reward counts as the mean of its group."""
        groups = filled(rows.rewards.view(-1, self.config.answers))
        advantages = group_advantages(groups).flatten()
        return rows._replace(advantages=per_token(advantages, rows.mask))

    def told(self, rows: Rollout, logprobs: Tensor) -> dict[str, Metric]:
        """Also the share of groups that teach nothing."""
        same = degenerate(filled(rows.rewards.view(-1, self.config.answers)))
        count = torch.tensor(len(same), device=same.device)
        return super().told(rows, logprobs) | {"degenerate": Metric(same.sum(), count)}


def filled(rewards: Tensor) -> Tensor:
    """(P, G) rewards with the mean of its row, or else 0, wherever one is not a number."""
    there = torch.isfinite(rewards)
    mean = torch.where(there, rewards, 0).sum(1) / there.sum(1).clamp(min=1)
    return torch.where(there, rewards, mean[:, None])
