"""What is worth knowing of a part of a rollout."""

import torch
from torch import Tensor

from tinsmith.objectives.base import Metric
from tinsmith.objectives.logprobs import kl
from tinsmith.objectives.online import Online
from tinsmith.objectives.ratio import clipped, log_ratio
from tinsmith.objectives.rollout import Rollout


def told(config: Online, rows: Rollout, logprobs: Tensor) -> dict[str, Metric]:
    """What is worth knowing of a part of a rollout. Estimators of a KL divergence are named:
    `kl_k3` is that to the reference, `moved_k2` that to the policy that answered.
    """
    mask, new = rows.mask, logprobs.detach()
    answers, tokens = _count(rows.rewards), mask.sum()
    bounds = (config.clip_low, config.clip_high)
    outside = clipped(new, rows.old, rows.advantages, mask, *bounds)
    moved = kl(log_ratio(new, rows.old, mask), torch.zeros_like(new), "k2")
    rewarded = torch.isfinite(rows.rewards)
    groups = rows.rewards.view(-1, config.answers if config.answers > 1 else len(rows.rewards))
    metrics = {
        "reward": Metric(rows.rewards.nansum(), rewarded.sum()),
        "reward_std": _mean(spread(groups)),
        "length": Metric(mask.sum().float(), (mask.any(1)).sum()),
        "truncated": Metric(rows.truncated.sum(), answers),
        "unrewarded": Metric((~rewarded).sum(), answers),
        "clipped": Metric(outside.sum(), tokens),
        "moved_k2": Metric(moved.sum(), tokens),
        "entropy": Metric(-(rows.old * mask).sum(), tokens),
    }
    if config.tools:
        metrics["turns"] = Metric(turns(mask).sum(), mask.any(1).sum())
    if config.judges():
        away = log_ratio(new, rows.reference, mask)
        metrics["kl_k3"] = Metric(kl(away, torch.zeros_like(away), "k3").sum(), tokens)
    return metrics


def spread(rewards: Tensor) -> Tensor:
    """(P,) population standard deviation of every row of (P, G), of the rewards that there are."""
    there = torch.isfinite(rewards)
    count = there.sum(1).clamp(min=1)
    known = torch.where(there, rewards, 0)
    mean = known.sum(1, keepdim=True) / count[:, None]
    return (torch.where(there, known - mean, 0).square().sum(1) / count).sqrt()


def turns(mask: Tensor) -> Tensor:
    """(B,) how often the policy spoke: stretches of a mask (B, T) that are True."""
    return mask[:, 0].long() + (mask[:, 1:] & ~mask[:, :-1]).sum(1)


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(len(rows), device=rows.device)


def _mean(values: Tensor) -> Metric:
    return Metric(values.sum(), _count(values))
