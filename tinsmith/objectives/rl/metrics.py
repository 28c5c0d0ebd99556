"""Metrics of a rollout minibatch: reward, length, clip fraction, KL divergence, entropy."""

import torch
from torch import Tensor

from tinsmith.losses.logprobs import kl
from tinsmith.losses.policy import log_ratio
from tinsmith.objectives.base import Metric
from tinsmith.objectives.rl.base import RLConfig
from tinsmith.objectives.rl.rollout import RolloutBatch

SAMPLING_CLIP = 0.2
"""Ratios of training to sampling probabilities that differ from 1 by more are counted."""


def rollout_metrics(
    config: RLConfig, rows: RolloutBatch, logprobs: Tensor, clipped: Tensor
) -> dict[str, Metric]:
    """Return the metrics of a rollout minibatch. `clipped` (B, T) marks tokens without gradient.

    `kl` estimates the divergence from the reference (k3), and `approx_kl` that from the policy
    before the first step on the rollout (k2). `sampling_logprob_difference` and
    `sampling_clip_fraction` compare that policy with the engine that sampled.
    """
    mask, new = rows.mask, logprobs.detach()
    answers, tokens = _count(rows.rewards), mask.sum()
    moved = kl(log_ratio(new, rows.old_logprobs, mask), torch.zeros_like(new), "k2")
    mismatch = log_ratio(rows.old_logprobs, rows.sampling_logprobs, mask)
    outside = (mismatch.exp() - 1).abs() > SAMPLING_CLIP
    rewarded = torch.isfinite(rows.rewards)
    groups = rows.rewards.view(
        -1, config.num_generations if config.num_generations > 1 else len(rows.rewards)
    )
    metrics = {
        "reward": Metric(rows.rewards.nansum(), rewarded.sum()),
        "reward_std": _mean(group_std(groups)),
        "completion_length": Metric(mask.sum().float(), (mask.any(1)).sum()),
        "truncated_fraction": Metric(rows.truncated.sum(), answers),
        "reward_failed_fraction": Metric((~rewarded).sum(), answers),
        "clip_fraction": Metric(clipped.sum(), tokens),
        "approx_kl": Metric(moved.sum(), tokens),
        "sampling_entropy": Metric(-(rows.sampling_logprobs * mask).sum(), tokens),
        "sampling_logprob_difference": Metric(mismatch.abs().sum(), tokens),
        "sampling_clip_fraction": Metric(outside.sum(), tokens),
    }
    if config.tools:
        metrics["turns"] = Metric(count_turns(mask).sum(), mask.any(1).sum())
    if config.frozen_models():
        away = log_ratio(new, rows.ref_logprobs, mask)
        metrics["kl"] = Metric(kl(away, torch.zeros_like(away), "k3").sum(), tokens)
    return metrics


def group_std(rewards: Tensor) -> Tensor:
    """Return the population standard deviation (P,) of the finite rewards in each row of (P, G)."""
    there = torch.isfinite(rewards)
    count = there.sum(1).clamp(min=1)
    known = torch.where(there, rewards, 0)
    mean = known.sum(1, keepdim=True) / count[:, None]
    return (torch.where(there, known - mean, 0).square().sum(1) / count).sqrt()


def count_turns(mask: Tensor) -> Tensor:
    """Count the turns (B,) of the policy: runs of True in a mask (B, T)."""
    return mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(len(rows), device=rows.device)


def _mean(values: Tensor) -> Metric:
    return Metric(values.sum(), _count(values))
